"""Factoring rules: which axes of a leaf form the rows and columns of a matrix."""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from came_optax._checks import check_regex, is_int
from came_optax._factored_axes import (
    FactoredAxes,
    FactoringRule,
    check_rule,
    checked_axes,
)
from came_optax._paths import KeyPath, Shape, path_name


def _set_min_dim_size(rule: Any) -> None:
    """Makes a plain int of a rule's ``min_dim_size``, or raises."""
    size = rule.min_dim_size
    if not is_int(size) or size < 1:
        raise ValueError(
            f"{type(rule).__name__}(min_dim_size=...) must be an int >= 1, got {size!r}"
        )
    _set(rule, min_dim_size=int(size))


def _set(instance: Any, **fields: Any) -> None:
    """Sets fields of a frozen dataclass, in its ``__init__``."""
    for name, value in fields.items():
        object.__setattr__(instance, name, value)


@dataclasses.dataclass(frozen=True)
class LastTwoAxes:
    """Factors the last two axes of every leaf of two or more dimensions.

    This is what the authors' code does; the leading axes are batch axes. So attention
    kernels of Flax, ``(d, heads, head_dim)``, become ``d`` small matrices:
    :class:`BalancedSplit` reads them as the matrix that they are in PyTorch.

    Attributes:
      min_dim_size: leaves with fewer rows or fewer columns stay unfactored. With 2 the
        factor ``(d, 1)`` of a LoRA has d numbers of statistics, its second moment; with
        1 it has 2d + 2, of rows and columns.

    Example:
      >>> LastTwoAxes().axes((), (8, 4, 3))
      FactoredAxes(row=(1,), col=(2,), stack=())
    """

    min_dim_size: int = 1

    def __post_init__(self) -> None:
        _set_min_dim_size(self)

    def axes(self, path: KeyPath, shape: Shape) -> FactoredAxes | None:
        """See :class:`FactoringRule`."""
        del path
        ndim = len(shape)
        if ndim < 2 or min(shape[-2:]) < self.min_dim_size:
            return None
        return FactoredAxes((ndim - 2,), (ndim - 1,))


@dataclasses.dataclass(frozen=True)
class LargestTwoAxes:
    """Factors the two largest axes, if both are large: ``optax.adafactor``'s rule.

    Attributes:
      min_dim_size: leaves whose second largest axis is smaller stay unfactored.

    Example:
      >>> LargestTwoAxes().axes((), (3, 3, 256, 512))
      FactoredAxes(row=(2,), col=(3,), stack=())
      >>> LargestTwoAxes().axes((), (64, 512)) is None
      True
    """

    min_dim_size: int = 128

    def __post_init__(self) -> None:
        _set_min_dim_size(self)

    def axes(self, path: KeyPath, shape: Shape) -> FactoredAxes | None:
        """See :class:`FactoringRule`."""
        del path
        if len(shape) < 2:
            return None
        row, col = (int(axis) for axis in np.argsort(shape, kind="stable")[-2:])
        return FactoredAxes((row,), (col,)) if shape[row] >= self.min_dim_size else None


@dataclasses.dataclass(frozen=True)
class BalancedSplit:
    """Splits the axes into a prefix and a suffix with the smallest statistics.

    An attention kernel ``(d, heads, head_dim)`` becomes the matrix ``(d | heads *
    head_dim)`` that it is in PyTorch, its output projection ``(heads * head_dim |
    d)``, a convolution ``HWIO`` the matrix ``(H * W * I | O)``. Nothing is reshaped:
    the means run over several axes.

    Attributes:
      min_dim_size: leaves with fewer rows or fewer columns stay unfactored.

    Example:
      >>> BalancedSplit().axes((), (768, 12, 64))
      FactoredAxes(row=(0,), col=(1, 2), stack=())
      >>> BalancedSplit().axes((), (12, 64, 768))
      FactoredAxes(row=(0, 1), col=(2,), stack=())
    """

    min_dim_size: int = 1

    def __post_init__(self) -> None:
        _set_min_dim_size(self)

    def axes(self, path: KeyPath, shape: Shape) -> FactoredAxes | None:
        """See :class:`FactoringRule`."""
        del path
        if len(shape) < 2:
            return None

        def sizes(split: int) -> tuple[int, int]:
            return math.prod(shape[:split]), math.prod(shape[split:])

        axes = tuple(range(len(shape)))
        split = min(axes[1:], key=lambda split: sum(sizes(split)))
        if min(sizes(split)) < self.min_dim_size:
            return None
        return FactoredAxes(axes[:split], axes[split:])


@dataclasses.dataclass(frozen=True)
class Stacked:
    """Applies ``rule`` to each slice of leaves that stack independent parameters.

    For layers stacked by ``nnx.scan``, ``nn.scan`` or ``jax.lax.scan``: the stack is
    then updated as its separate layers would be. Leaves that ``where`` leaves out are
    given to ``rule`` whole.

    Attributes:
      rule: the rule for one slice.
      axis: the axis that is stacked; negative counts from the end.
      where: a regular expression, searched in the leaf's path written as
        ``"params/blocks/kernel"``. The default takes every leaf. ``init`` warns of one
        that no leaf matches.

    Example:
      >>> Stacked(LastTwoAxes()).axes((), (24, 512, 2048))
      FactoredAxes(row=(1,), col=(2,), stack=(0,))
    """

    rule: FactoringRule = LastTwoAxes()
    axis: int = 0
    where: str = ""

    def __post_init__(self) -> None:
        if not is_int(self.axis):
            raise TypeError(f"Stacked(axis=...) must be an int, got {self.axis!r}")
        check_regex("Stacked(where=...)", self.where)
        check_rule(self.rule, "Stacked(rule=...)")
        _set(self, axis=int(self.axis))

    def axes(self, path: KeyPath, shape: Shape) -> FactoredAxes | None:
        """See :class:`FactoringRule`."""
        if not re.search(self.where, path_name(path)):
            return self.rule.axes(path, shape)
        ndim = len(shape)
        if not -ndim <= self.axis < ndim:
            raise ValueError(
                f"Stacked(axis={self.axis}): leaf {path_name(path)!r} of shape {shape} "
                f"has no such axis; restrict the rule with where="
            )
        axis = self.axis % ndim
        slice_shape = shape[:axis] + shape[axis + 1 :]
        axes = checked_axes(self.rule, path, slice_shape)

        def in_stack(slice_axes: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(a + (a >= axis) for a in slice_axes)

        return FactoredAxes(
            in_stack(axes.row), in_stack(axes.col), (axis, *in_stack(axes.stack))
        )


@dataclasses.dataclass(frozen=True, init=False, repr=False)
class ByPath:
    """Applies to each leaf the first rule whose regular expression its path matches.

    For leaves whose shapes don't tell which matrices they are, such as Gemma's
    projections ``(heads, d, head_dim)``, which are ``(d | heads * head_dim)``.

    Attributes:
      rules: pairs of a regular expression, searched in the leaf's path written as
        ``"params/blocks/kernel"``, and a rule, or the axes themselves.
        ``FactoredAxes()`` leaves a leaf unfactored. Pass them as a dict. ``init`` warns
        of a regular expression that no leaf matches.
      default: the rule for leaves that none of them matches.

    Example:
      >>> from jax.tree_util import DictKey
      >>> rule = ByPath({"q_einsum": FactoredAxes(row=(1,), col=(0, 2))})
      >>> rule.axes((DictKey("q_einsum"),), (8, 2048, 256))
      FactoredAxes(row=(1,), col=(0, 2), stack=())
    """

    rules: tuple[tuple[str, FactoringRule | FactoredAxes], ...]
    default: FactoringRule

    def __init__(
        self,
        rules: Mapping[str, FactoringRule | FactoredAxes]
        | Iterable[tuple[str, FactoringRule | FactoredAxes]],
        default: FactoringRule = LastTwoAxes(),
    ) -> None:
        try:
            given = dict(rules)
        except (TypeError, ValueError) as error:
            raise TypeError(
                "ByPath(rules=...) must be a dict from regular expressions to rules or "
                f"FactoredAxes, got {rules!r}"
            ) from error
        pairs: list[tuple[str, FactoringRule | FactoredAxes]] = []
        for pattern, rule in given.items():
            check_regex("ByPath(rules=...): each key", pattern)
            name = f"ByPath(rules=...) at {pattern!r}"
            if isinstance(rule, FactoredAxes):
                pairs.append((pattern, _plain(rule, name)))
            else:
                check_rule(rule, name)
                pairs.append((pattern, rule))
        check_rule(default, "ByPath(default=...)")
        _set(self, rules=tuple(pairs), default=default)

    def __repr__(self) -> str:
        return f"ByPath({dict(self.rules)!r}, default={self.default!r})"

    def axes(self, path: KeyPath, shape: Shape) -> FactoredAxes | None:
        """See :class:`FactoringRule`."""
        name = path_name(path)
        for pattern, rule in self.rules:
            if re.search(pattern, name):
                return (
                    rule if isinstance(rule, FactoredAxes) else rule.axes(path, shape)
                )
        return self.default.axes(path, shape)


def _plain(axes: FactoredAxes, name: str) -> FactoredAxes:
    """Returns the same axes in tuples of ints, which have a hash and a short repr."""
    fields = (axes.row, axes.col, axes.stack)
    if not all(isinstance(some, tuple) and all(map(is_int, some)) for some in fields):
        raise TypeError(
            f"{name}: row, col and stack must be tuples of ints, got {axes}"
        )
    return FactoredAxes(*(tuple(map(int, some)) for some in fields))

"""Factoring rules: which axes of a leaf form the rows and columns of a matrix."""

import contextlib
import contextvars
import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from came_optax._checks import KeyPath, Shape, path_name
from came_optax._literals import parse_repr


@dataclasses.dataclass(frozen=True)
class FactoredAxes:
    """How one leaf is read as a matrix, or a batch of matrices.

    The row statistic is the mean over the ``col`` axes, the column statistic the
    mean over the ``row`` axes. Axes named nowhere are batch axes: they have their own
    statistics but share the leaf's RMS clip, as published.

    Attributes:
      row: axes that together index the rows.
      col: axes that together index the columns. ``row`` and ``col`` both empty means
        that the leaf is not factored.
      stack: axes that hold independent parameters, such as the layers stacked by
        ``nn.scan``: the RMS clip applies to each slice on its own.
    """

    row: tuple[int, ...] = ()
    col: tuple[int, ...] = ()
    stack: tuple[int, ...] = ()

    @property
    def factored(self) -> bool:
        """Whether the leaf has row and column statistics."""
        return bool(self.row)


@runtime_checkable
class FactoringRule(Protocol):
    """What a factoring rule must offer.

    Write your own as a non-callable frozen dataclass (``optax.inject_hyperparams``
    takes anything callable for a schedule).
    """

    def axes(self, path: KeyPath, shape: Shape) -> FactoredAxes | None:
        """Returns the axes to factor.

        Args:
          path: the leaf's key path, as given by ``jax.tree_util``.
          shape: the leaf's shape.

        Returns:
          The factored axes, or None to keep the full second moment.
        """


@dataclasses.dataclass(frozen=True)
class LastTwoAxes:
    """Factors the last two axes of every leaf of two or more dimensions.

    This is the published behaviour; the leading axes are batch axes.

    Example:
      >>> LastTwoAxes().axes((), (8, 4, 3))
      FactoredAxes(row=(1,), col=(2,), stack=())
    """

    def axes(self, path: KeyPath, shape: Shape) -> FactoredAxes | None:
        """See :class:`FactoringRule`."""
        del path
        ndim = len(shape)
        return FactoredAxes((ndim - 2,), (ndim - 1,)) if ndim >= 2 else None


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
        if not _is_int(self.min_dim_size) or self.min_dim_size < 1:
            raise ValueError(
                "LargestTwoAxes(min_dim_size=...) must be an int >= 1, got "
                f"{self.min_dim_size!r}"
            )
        _set(self, min_dim_size=int(self.min_dim_size))

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

    Example:
      >>> BalancedSplit().axes((), (768, 12, 64))
      FactoredAxes(row=(0,), col=(1, 2), stack=())
      >>> BalancedSplit().axes((), (12, 64, 768))
      FactoredAxes(row=(0, 1), col=(2,), stack=())
    """

    def axes(self, path: KeyPath, shape: Shape) -> FactoredAxes | None:
        """See :class:`FactoringRule`."""
        del path
        if len(shape) < 2:
            return None

        def statistics_size(split: int) -> int:
            return math.prod(shape[:split]) + math.prod(shape[split:])

        axes = tuple(range(len(shape)))
        split = min(axes[1:], key=statistics_size)
        return FactoredAxes(axes[:split], axes[split:])


@dataclasses.dataclass(frozen=True, init=False)
class Stacked:
    """Applies ``rule`` to each slice of leaves that stack independent parameters.

    For layers stacked by ``nnx.scan``, ``nn.scan`` or ``jax.lax.scan``: the stack is
    then updated as its separate layers would be. Leaves that ``where`` leaves out are
    given to ``rule`` whole.

    Attributes:
      rule: the rule for one slice.
      axis: the axis that is stacked; negative counts from the end.
      where: a regular expression, searched in the leaf's path written as
        ``"params/blocks/kernel"``. The default takes every leaf.

    Example:
      >>> Stacked(LastTwoAxes()).axes((), (24, 512, 2048))
      FactoredAxes(row=(1,), col=(2,), stack=(0,))
    """

    rule: FactoringRule
    axis: int
    where: str

    def __init__(
        self,
        rule: FactoringRule | str = LastTwoAxes(),
        axis: int = 0,
        where: str = "",
    ) -> None:
        if not _is_int(axis):
            raise TypeError(f"Stacked(axis=...) must be an int, got {axis!r}")
        _check_regex(where, "Stacked(where=...)")
        _set(self, rule=as_rule(rule, "Stacked(rule=...)"), axis=int(axis), where=where)

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
        axes = checked_axes(self.rule.axes(path, slice_shape), path, slice_shape)

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
        ``FactoredAxes()`` leaves a leaf unfactored. Pass them as a dict.
      default: the rule for leaves that none of them matches.

    Example:
      >>> rule = ByPath({"q_einsum": FactoredAxes(row=(1,), col=(0, 2))})
      >>> rule.axes((jax.tree_util.DictKey("q_einsum"),), (8, 2048, 256))
      FactoredAxes(row=(1,), col=(0, 2), stack=())
    """

    rules: tuple[tuple[str, FactoringRule | FactoredAxes], ...]
    default: FactoringRule

    def __init__(
        self,
        rules: Mapping[str, FactoringRule | FactoredAxes | str]
        | Iterable[tuple[str, FactoringRule | FactoredAxes | str]],
        default: FactoringRule | str = LastTwoAxes(),
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
            _check_regex(pattern, "ByPath(rules=...): each key")
            name = f"ByPath(rules=...) at {pattern!r}"
            if isinstance(rule, FactoredAxes):
                pairs.append((pattern, _plain(rule, name)))
            else:
                pairs.append((pattern, as_rule(rule, name)))
        default = as_rule(default, "ByPath(default=...)")
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


def _is_int(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _plain(axes: FactoredAxes, name: str) -> FactoredAxes:
    """Returns the same axes in tuples of ints, which have a hash and a short repr."""
    fields = (axes.row, axes.col, axes.stack)
    if not all(isinstance(some, tuple) and all(map(_is_int, some)) for some in fields):
        raise TypeError(
            f"{name}: row, col and stack must be tuples of ints, got {axes}"
        )
    return FactoredAxes(*(tuple(map(int, some)) for some in fields))


def _check_regex(pattern: Any, name: str) -> None:
    must_be = f"{name} must be a regular expression, got {pattern!r}"
    if not isinstance(pattern, str):
        raise ValueError(must_be)
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{must_be}: {error}") from error


def _set(instance: Any, **fields: Any) -> None:
    """Sets fields of a frozen dataclass, in its ``__init__``."""
    for name, value in fields.items():
        object.__setattr__(instance, name, value)


def checked_axes(
    axes: FactoredAxes | None, path: KeyPath, shape: Shape
) -> FactoredAxes:
    """Returns a rule's answer, axes counted from 0, or says what is wrong with it."""
    if axes is None:
        return FactoredAxes()
    answer = f"factoring gave {axes!r} for leaf {path_name(path)!r} of shape {shape}"
    if not isinstance(axes, FactoredAxes):
        raise TypeError(f"{answer}; allowed are FactoredAxes and None")
    ndim = len(shape)
    if not all(isinstance(some, tuple) for some in (axes.row, axes.col, axes.stack)):
        raise TypeError(f"{answer}; row, col and stack must be tuples of axes")
    named = (*axes.row, *axes.col, *axes.stack)
    if not all(_is_int(axis) and -ndim <= axis < ndim for axis in named):
        allowed = f"axes from {-ndim} to {ndim - 1}" if ndim else "no axes"
        raise ValueError(f"{answer}; allowed are {allowed}")
    if len({axis % ndim for axis in named}) < len(named):
        raise ValueError(f"{answer}; an axis may be named only once")
    if bool(axes.row) != bool(axes.col):
        raise ValueError(f"{answer}; name both row and col axes, or neither")

    def from_zero(axes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(int(axis) % ndim for axis in axes)

    return FactoredAxes(from_zero(axes.row), from_zero(axes.col), from_zero(axes.stack))


def as_rule(rule: Any, name: str = "factoring") -> FactoringRule:
    """Returns a factoring rule, which may be given as its own ``repr``.

    Args:
      rule: a rule, or a string such as ``"Stacked(BalancedSplit(), axis=1)"``, which is
        what command lines and configuration files can hold.
      name: the argument, for errors.
    """
    given = parse_repr(rule, _CLASSES, name) if isinstance(rule, str) else rule
    if isinstance(given, type) or not isinstance(given, FactoringRule):
        raise TypeError(
            f"{name} must be the repr of a rule of came_optax, or an object with a "
            f"method axes(path, shape), such as LastTwoAxes(), got {rule!r}"
        )
    return given


_CLASSES = {
    cls.__name__: cls
    for cls in (
        LastTwoAxes,
        LargestTwoAxes,
        BalancedSplit,
        Stacked,
        ByPath,
        FactoredAxes,
    )
}


_instead: contextvars.ContextVar[FactoringRule | None] = contextvars.ContextVar(
    "_instead", default=None
)


@contextlib.contextmanager
def all_factored_by(rule: FactoringRule) -> Iterator[None]:
    """Within it, ``rule`` takes the place of the rule of every transformation.

    No argument would reach those inside of ``optax.chain``, ``masked`` and the like.
    """
    token = _instead.set(rule)
    try:
        yield
    finally:
        _instead.reset(token)


def factored_axes(rule: FactoringRule | str, tree: Any) -> Any:
    """Returns the tree of :class:`FactoredAxes` that ``rule`` gives for ``tree``.

    Leaves of which it would be no smaller are not factored: see :func:`_saves`.
    """
    rule = _instead.get() or as_rule(rule)

    def leaf_axes(path: KeyPath, leaf: Any) -> FactoredAxes:
        shape = jnp.shape(leaf)
        if math.prod(shape) == 0:  # There is nothing to take a mean of.
            return FactoredAxes()
        axes = checked_axes(rule.axes(path, shape), path, shape)
        return axes if _saves(axes, shape) else FactoredAxes(stack=axes.stack)

    return jax.tree.map_with_path(leaf_axes, tree)


def _saves(axes: FactoredAxes, shape: Shape) -> bool:
    """Returns whether statistics of rows and columns are as small as the whole's.

    There are two of each, and only one whole: the leaf of a LoRA of rank 1 would take
    16 bytes of statistics a parameter in place of 4.
    """

    def size(reduced: tuple[int, ...]) -> int:
        return math.prod(n for axis, n in enumerate(shape) if axis not in reduced)

    return 2 * (size(axes.col) + size(axes.row)) <= math.prod(shape)

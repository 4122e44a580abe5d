"""What a factoring rule says of a leaf: which axes are rows, and which columns."""

import dataclasses
import math
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from came_optax._checks import is_int
from came_optax._paths import KeyPath, Shape, path_name


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


def checked_axes(rule: FactoringRule, path: KeyPath, shape: Shape) -> FactoredAxes:
    """Returns a rule's answer, axes counted from 0, or says what is wrong with it."""
    axes = rule.axes(path, shape)
    if axes is None:
        return FactoredAxes()
    answer = f"factoring gave {axes!r} for leaf {path_name(path)!r} of shape {shape}"
    if not isinstance(axes, FactoredAxes):
        raise TypeError(f"{answer}; allowed are FactoredAxes and None")
    ndim = len(shape)
    if not all(isinstance(some, tuple) for some in (axes.row, axes.col, axes.stack)):
        raise TypeError(f"{answer}; row, col and stack must be tuples of axes")
    named = (*axes.row, *axes.col, *axes.stack)
    if not all(is_int(axis) and -ndim <= axis < ndim for axis in named):
        allowed = f"axes from {-ndim} to {ndim - 1}" if ndim else "no axes"
        raise ValueError(f"{answer}; allowed are {allowed}")
    if len({axis % ndim for axis in named}) < len(named):
        raise ValueError(f"{answer}; an axis may be named only once")
    if bool(axes.row) != bool(axes.col):
        raise ValueError(f"{answer}; name both row and col axes, or neither")

    def from_zero(axes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(int(axis) % ndim for axis in axes)

    return FactoredAxes(from_zero(axes.row), from_zero(axes.col), from_zero(axes.stack))


def check_rule(rule: Any, name: str = "factoring") -> None:
    """Raises unless ``rule`` is a factoring rule, and no class of them."""
    if isinstance(rule, type) or not isinstance(rule, FactoringRule):
        raise TypeError(
            f"{name} must be an object with a method axes(path, shape), such as "
            f"LastTwoAxes(), got {rule!r}"
        )


def factored_axes(rule: FactoringRule, tree: Any) -> Any:
    """Returns the tree of :class:`FactoredAxes` that ``rule`` gives for ``tree``."""

    def leaf_axes(path: KeyPath, leaf: Any) -> FactoredAxes:
        shape = jnp.shape(leaf)
        if math.prod(shape) == 0:  # There is nothing to take a mean of.
            return FactoredAxes()
        return checked_axes(rule, path, shape)

    return jax.tree.map_with_path(leaf_axes, tree)

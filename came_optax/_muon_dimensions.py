"""The axes that optax.contrib.muon was told, as a factoring rule."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers

from came_optax._boxes import unbox
from came_optax._checks import is_int
from came_optax._factored_axes import FactoredAxes
from came_optax._paths import KeyPath, Shape, path_name


@dataclasses.dataclass(frozen=True, init=False)
class ByMuonDimensionNumbers:
    """The rule that is in ``optax.contrib.MuonDimensionNumbers``, of each leaf.

    Reduction axes are rows and output axes columns; all other axes hold independent
    matrices, as those of :class:`Stacked` do. Leaves without numbers are not factored,
    and so are none of :func:`came_muon`'s hidden matrices.

    Attributes:
      numbers: each leaf's path and its axes. Pass what ``optax.contrib.muon`` takes:
        a tree, which may be a prefix of the parameters', or a function from parameters
        to one, and then the parameters (or their shapes) too.

    Example:
      >>> from optax.contrib import MuonDimensionNumbers
      >>> rule = ByMuonDimensionNumbers({"query": MuonDimensionNumbers(0, (1, 2))})
      >>> rule.axes((jax.tree_util.DictKey("query"),), (768, 12, 64))
      FactoredAxes(row=(0,), col=(1, 2), stack=())
    """

    numbers: tuple[tuple[str, FactoredAxes], ...]

    def __init__(self, numbers: Any, params: optax.Params | None = None) -> None:
        if callable(numbers):
            if params is None:
                raise ValueError(
                    "ByMuonDimensionNumbers of a function needs params, got None"
                )
            numbers = numbers(unbox(params))
        leaves = jax.tree.leaves_with_path(numbers, is_leaf=_is_numbers)
        for path, leaf in leaves:
            if not _is_numbers(leaf):
                raise TypeError(
                    f"ByMuonDimensionNumbers has {leaf!r} at {path_name(path)!r}; "
                    "allowed are MuonDimensionNumbers and None"
                )
        given = tuple(
            (path_name(path), FactoredAxes(*map(_axes, leaf))) for path, leaf in leaves
        )
        object.__setattr__(self, "numbers", given)

    def axes(self, path: KeyPath, shape: Shape) -> FactoredAxes | None:
        """See :class:`FactoringRule`."""
        name, ndim = path_name(path), len(shape)
        for prefix, axes in self.numbers:
            if is_within(name, prefix):
                named = [axis % max(ndim, 1) for axis in axes.row + axes.col]
                stack = tuple(axis for axis in range(ndim) if axis not in named)
                return dataclasses.replace(axes, stack=stack)
        return None


def is_within(name: str, prefix: str) -> bool:
    """Returns whether a leaf is what a path names, or in a subtree that it names."""
    return name == prefix or not prefix or name.startswith(f"{prefix}/")


def _is_numbers(x: Any) -> bool:
    return isinstance(x, MuonDimensionNumbers)


def _axes(axes: Any) -> tuple[int, ...]:
    return (int(axes),) if is_int(axes) else tuple(axes)

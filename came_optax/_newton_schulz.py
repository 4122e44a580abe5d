"""Newton and Schulz's iteration of many matrices, on one device or on a mesh.

Matrices have the shape (batch, short, long). On a mesh those of one size are stacked,
the stack is laid over all devices, so that each of them has whole matrices and iterates
on its own, and goes back to where the matrices were: two exchanges a stack, in place of
one or more for each product.
"""

import collections
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from came_optax._arrays import wide_dtype
from came_optax._factoring import FactoredAxes

Coefficients: TypeAlias = Sequence[tuple[float, float, float]]
Names: TypeAlias = tuple[str, ...]  # Of mesh axes.


def newton_schulz(x: jax.Array, coeffs: Coefficients, dtype: DTypeLike) -> jax.Array:
    """Returns near polar factors of matrices: (..., short, long).

    Args:
      x: the matrices.
      coeffs: the iteration's, one triple a step.
      dtype: the iteration's, and the result's.
    """
    wide = wide_dtype(x.dtype)
    x = x.astype(wide)
    # Twice, as squares of 1e-30 and 1e30 are beyond float32, and first by roots, as the
    # reciprocal of 1e38 is.
    largest = jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True)
    root = jax.lax.rsqrt(jnp.where(largest < jnp.finfo(wide).tiny, 1, largest))
    x = x * root.astype(wide) * root.astype(wide)
    square = jnp.sum(jnp.real(x * jnp.conj(x)), axis=(-2, -1), keepdims=True)
    norm = jnp.sqrt(jnp.maximum(square, 1))  # 1 or more, or of zeros.
    x = (x / norm.astype(wide)).astype(dtype)
    for a, b, c in coeffs:
        gram = x @ jnp.conj(x.mT)
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x


class Layout(NamedTuple):
    """How a leaf is brought to matrices.

    Attributes:
      order: its axes, those of the batch first, then those of the shorter side.
      sizes: of (batch, short, long).
      names: the mesh axes over which each of the three is sharded.
    """

    order: tuple[int, ...]
    sizes: tuple[int, int, int]
    names: tuple[Names, Names, Names]


def layout(
    shape: tuple[int, ...], axes: FactoredAxes, spec: Sequence[Any] = ()
) -> Layout:
    """Returns the layout of a leaf's matrices, each with the shorter side first.

    A square one has that side first whose mesh axes come first in the alphabet: then
    ``(d, d)`` shares a stack with its like, whichever way it is sharded. Rows and
    columns may come in any order; an axis that is sharded comes first.
    """
    entries = [*spec, *[None] * (len(shape) - len(spec))]
    names = [_names(entry) for entry in entries]

    def side(axes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sorted(axes, key=lambda axis: not names[axis]))

    def size(axes: tuple[int, ...]) -> int:
        return math.prod(shape[axis] for axis in axes)

    def names_of(axes: tuple[int, ...]) -> Names:
        return names[axes[0]] if axes else ()

    sides = side(axes.row), side(axes.col)
    short, long = sorted(sides, key=lambda s: (size(s), not names_of(s), names_of(s)))
    batch = side(tuple(a for a in range(len(shape)) if a not in short + long))
    return Layout(
        batch + short + long,
        (size(batch), size(short), size(long)),
        (names_of(batch), names_of(short), names_of(long)),
    )


def matrices(x: jax.Array, place: Layout) -> jax.Array:
    """Returns a leaf's matrices."""
    return x.transpose(place.order).reshape(place.sizes)


def leaf(x: jax.Array, shape: tuple[int, ...], place: Layout) -> jax.Array:
    """Returns the leaf of such a shape that has these matrices."""
    inverse = np.argsort(place.order)
    return x.reshape([shape[a] for a in place.order]).transpose(inverse)


def polar_factors(
    leaves: Sequence[jax.Array],
    axes: Sequence[FactoredAxes],
    dtypes: Sequence[DTypeLike],
    coeffs: Coefficients,
) -> list[jax.Array]:
    """Returns near polar factors of leaves' matrices, one leaf after the other.

    Args:
      leaves: the leaves.
      axes: their rows and columns.
      dtypes: of the iteration of each.
      coeffs: the iteration's, one triple a step.

    Returns:
      What has the shapes of the leaves, in float32 or wider.
    """
    polar = []
    for x, leaf_axes, dtype in zip(leaves, axes, dtypes, strict=True):
        place = layout(x.shape, leaf_axes)
        y = newton_schulz(matrices(x, place), coeffs, dtype)
        polar.append(leaf(y, x.shape, place).astype(wide_dtype(x.dtype)))
    return polar


def polar_factors_on_mesh(
    leaves: Sequence[jax.Array],
    axes: Sequence[FactoredAxes],
    dtypes: Sequence[DTypeLike],
    coeffs: Coefficients,
    mesh: Any,
    specs: Sequence[Sequence[Any]],
) -> list[jax.Array]:
    """Returns what :func:`polar_factors` does, each matrix iterated on one device.

    Args:
      leaves: the leaves.
      axes: their rows and columns.
      dtypes: of the iteration of each.
      coeffs: the iteration's, one triple a step.
      mesh: a mesh, whose axes are ``Auto`` or ``Manual``.
      specs: how each leaf is sharded over the ``Auto`` ones.
    """
    places = list(map(layout, (x.shape for x in leaves), axes, specs))
    stacks: Any = collections.defaultdict(list)
    for i, (place, dtype) in enumerate(zip(places, dtypes, strict=True)):
        stacks[place.sizes[1:], place.names, jnp.dtype(dtype)].append(i)
    polar = list(leaves)
    for ((short, long), names, stack_dtype), members in stacks.items():
        steps = _exchange(mesh, names)
        # Matrices that are sharded as a batch stay on their devices' part of the mesh.
        parts = _number(mesh, names[0])
        slots = _number(mesh, steps[-1][1])
        grouped = [
            matrices(leaves[i], places[i])
            .astype(stack_dtype)
            .reshape(parts, -1, short, long)
            for i in members
        ]
        stack = jnp.concatenate(grouped, axis=1)
        padding = (0, -stack.shape[1] % slots)
        stack = jnp.pad(stack, ((0, 0), padding, (0, 0), (0, 0)))
        for spec in steps:
            stack = _constrain(stack, mesh, spec)
        stack = newton_schulz(stack, coeffs, stack_dtype)
        for spec in reversed(steps):
            stack = _constrain(stack, mesh, spec)
        begin = 0
        for i, x in zip(members, grouped, strict=True):
            end = begin + x.shape[1]
            y = leaf(stack[:, begin:end], leaves[i].shape, places[i])
            polar[i] = y.astype(wide_dtype(leaves[i].dtype))
            begin = end
    return polar


def _exchange(mesh: Any, names: tuple[Names, Names, Names]) -> list[PartitionSpec]:
    """Returns the ways to lay out a stack, from its leaves' to whole matrices.

    One side after the other, as XLA may replicate what it can't bring there in one go.
    """
    batch, short, long = names
    rest = tuple(
        name
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind != AxisType.Manual and name not in batch + short + long
    )
    return [
        PartitionSpec(batch, (), short, long),
        PartitionSpec(batch, short, (), long),
        PartitionSpec(batch, short + long),
        PartitionSpec(batch, short + long + rest),
    ]


def _number(mesh: Any, names: Any) -> int:
    return math.prod(mesh.shape[name] for name in _names(names))


def _constrain(x: jax.Array, mesh: Any, spec: PartitionSpec) -> jax.Array:
    place = NamedSharding(mesh, spec)
    constrained: jax.Array = jax.lax.with_sharding_constraint(x, place)
    return constrained


def _names(entry: Any) -> Names:
    return entry if isinstance(entry, tuple) else () if entry is None else (entry,)

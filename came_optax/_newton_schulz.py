"""Newton and Schulz's iteration of many matrices, of shape (batch, short, long)."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from came_optax._arrays import wide_dtype
from came_optax._factored_axes import FactoredAxes
from came_optax._specs import Names, mesh_axes

Coefficients: TypeAlias = Sequence[tuple[float, float, float]]


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
    # On their Gram matrix two steps of wide matrices take fewer multiplications, and
    # round no more. Three would amplify what rounding adds to small eigenvalues.
    short, long = x.shape[-2:]
    at_once = 2 if 2 * long > 3 * short else 1
    for begin in range(0, len(coeffs), at_once):
        x = _polynomial(x @ jnp.conj(x.mT), coeffs[begin : begin + at_once]) @ x
    return x


def _polynomial(gram: jax.Array, coeffs: Coefficients) -> jax.Array:
    """Returns the matrix that X is multiplied by in some steps, from X Xᴴ."""
    (a, b, c), *others = coeffs
    identity = jnp.broadcast_to(jnp.eye(gram.shape[-1], dtype=gram.dtype), gram.shape)
    step = a * identity + b * gram + c * (gram @ gram)
    return _polynomial(step @ gram @ step, others) @ step if others else step


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
    names = [mesh_axes(entry) for entry in entries]

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

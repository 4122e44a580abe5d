"""Rounding of arrays to 8 or 4 bits.

A matrix is divided by the smaller of its row's and its column's largest magnitude.
That is one scale per element for the price of a factored statistic: finer than blocks
of 64, no padding where no block divides an axis, and a sharding that follows from the
array's as the statistics' does.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from came_optax._checks import Shape
from came_optax._factoring import FactoredAxes

Axes = tuple[int, ...]

_TOP = {8: 127, 4: 7}  # The largest code of so many bits; the smallest is its negative.
_REGISTER_ROWS = 8  # Of a TPU's vector registers.
_MANY_ROWS = 1024  # Padding them to pairs of registers costs less than 1.5 %.


def reductions(axes: FactoredAxes, ndim: int) -> tuple[Axes, Axes | None]:
    """Returns the axes that the row and column scales are maxima over.

    Leaves that aren't factored are read as matrices of their last two axes. None
    stands for the column scale that a vector doesn't have.
    """
    if axes.factored:
        return axes.col, axes.row
    free = tuple(axis for axis in range(ndim) if axis not in axes.stack)
    return free[-1:], free[-2:-1] or None


def largest(x: jax.Array, axes: Axes) -> jax.Array:
    """Returns the largest magnitude over ``axes``."""
    return jnp.max(jnp.abs(x), axes)


class Scales(NamedTuple):
    """The scales of a matrix's rows and columns.

    Attributes:
      row: those of rows; the matrix's shape without ``row_max``.
      col: those of columns, which a vector doesn't have.
      row_max: the axes that the rows' are maxima over.
      col_max: the axes that the columns' are maxima over, or None.
    """

    row: jax.Array
    col: jax.Array
    row_max: Axes
    col_max: Axes | None

    def of_elements(self, choose: Callable[..., jax.Array]) -> jax.Array:
        """Returns what ``choose`` makes of each element's row's and column's."""
        row = jnp.expand_dims(self.row, self.row_max)
        if self.col_max is None:
            return row
        return choose(row, jnp.expand_dims(self.col, self.col_max))

    def inverse(self) -> "Scales":
        """Returns 1 / scale, and 0 where there is nothing but zeros."""
        row, col = (
            jnp.where(scale < jnp.finfo(scale.dtype).tiny, 0, 1 / scale)
            for scale in (self.row, self.col)
        )
        return self._replace(row=row, col=col)


def encode(x: jax.Array, scales: Scales, bits: int) -> jax.Array:
    """Returns int8 codes of ``bits`` bits for numbers between −scale and scale.

    Rounding errors beyond that are cut off.
    """
    inverse = scales.inverse().of_elements(jnp.maximum)
    magnitude = jnp.minimum(jnp.abs(x) * inverse, 1)
    code = _TOP[bits] / 2 * (jnp.sqrt(1 + 8 * magnitude) - 1)
    return _nearest(jnp.where(x < 0, -code, code))


def decode(codes: jax.Array, scales: Scales, bits: int) -> jax.Array:
    """Returns approximately what :func:`encode` was given.

    Codes lie three times as close around 0, where most momentum is, as at ±1.
    """
    scale = scales.of_elements(jnp.minimum)
    y = codes.astype(scale.dtype) / _TOP[bits]
    return y * (1 + jnp.abs(y)) * (scale / 2)


def _nearest(x: jax.Array) -> jax.Array:
    """Returns the nearest int8, ties to even.

    On CPUs all of :func:`encode` takes half of the time if float32 addition rounds:
    beside 1.5 · 2²³ there are no bits left for a fraction. A TPU would no longer write
    codes and parameters in one pass.
    """

    def by_addition(x: jax.Array) -> jax.Array:
        zero = jnp.float32(1.5 * 2**23)
        bits = (x.astype(jnp.float32) + zero).view(jnp.int32)
        integer: jax.Array = bits - zero.view(jnp.int32)
        return integer.astype(jnp.int8)

    nearest: jax.Array = jax.lax.platform_dependent(
        x, cpu=by_addition, default=lambda x: jnp.round(x).astype(jnp.int8)
    )
    return nearest


def pack(codes: jax.Array) -> jax.Array:
    """Returns 4-bit codes two to a byte, those of a pair as :func:`pairing` says."""
    axis, distance = pairing(codes.shape)
    codes = _divisible(codes, axis)
    before, n, after = _split(codes.shape, axis)
    bytes_ = packed_shape(codes.shape)[axis]
    padding = [(0, int(i == axis) * (2 * bytes_ - n)) for i in range(codes.ndim)]
    pairs = jnp.pad(codes, padding).reshape(*before, -1, 2, distance, *after)
    low, high = (
        jax.lax.index_in_dim(pairs, i, axis + 1, keepdims=False) for i in (0, 1)
    )
    packed = ((low & 15) | (high << 4)).astype(jnp.uint8)
    return packed.reshape(*before, bytes_, *after)


def unpack(packed: jax.Array, like: jax.Array) -> jax.Array:
    """Returns codes that were packed, shaped and sharded as ``like``.

    Both halves of a byte come from one broadcast and a shift, which compilers fuse with
    what follows; they would write a concatenation to memory.
    """
    axis, distance = pairing(like.shape)
    before, n, after = _split(like.shape, axis)
    pairs = packed.view(jnp.int8).reshape(*before, -1, 1, distance, *after)
    to_pairs = [1] * (axis + 1) + [2, 1] + [1] * len(after)
    left_shifts = jnp.array([4, 0], jnp.int8).reshape(to_pairs)
    codes = (pairs << left_shifts) >> 4  # An arithmetic shift keeps the sign.
    codes = codes.reshape(*before, -1, *after)
    codes = jax.lax.slice_in_dim(codes, 0, n, axis=axis)
    sharding = jax.typeof(like).sharding
    if jax.typeof(codes).sharding != sharding:  # It was not `_divisible`.
        codes = jax.sharding.reshard(codes, sharding)
    return codes


def packed_shape(shape: Shape) -> Shape:
    """Returns the shape that :func:`pack` gives to codes of ``shape``."""
    axis, distance = pairing(shape)
    before, n, after = _split(shape, axis)
    return (*before, -(-n // (2 * distance)) * distance, *after)


def pairing(shape: Shape) -> tuple[int, int]:
    """Returns along which axis the codes that share a byte lie, and how far apart.

    Neighbours along the first axis of even size: for a TPU pairs of a stack's matrices
    cost less than pairs of rows, and those less than pairs of columns. If only columns
    are even but rows many, as in GPT-2's embedding, rows that are a vector register
    apart and some padding. Depends on nothing else, as states must not depend on a
    mesh; an odd axis isn't sharded.
    """
    even: list[int] = [axis for axis, n in enumerate(shape) if n % 2 == 0]
    rows = len(shape) - 2
    if rows >= 0 and even in ([], [rows + 1]) and shape[rows] >= _MANY_ROWS:
        return rows, _REGISTER_ROWS
    return (even or [0])[0], 1


def _split(shape: Shape, axis: int) -> tuple[Shape, int, Shape]:
    return shape[:axis], shape[axis], shape[axis + 1 :]


def _divisible(x: jax.Array, axis: int) -> jax.Array:
    """Returns ``x`` such that pairs along ``axis`` lie on one device each.

    Only explicit meshes must be told; there, an axis of which half doesn't divide among
    the devices is replicated.
    """
    sharding = jax.typeof(x).sharding
    names = sharding.spec[axis] or ()
    names = names if isinstance(names, tuple) else (names,)
    devices = math.prod(sharding.mesh.shape[name] for name in names)
    if packed_shape(x.shape)[axis] % devices == 0:
        return x
    entries = list(sharding.spec)
    entries[axis] = None
    spec = PartitionSpec(*entries)
    moved: jax.Array = jax.sharding.reshard(x, NamedSharding(sharding.mesh, spec))
    return moved

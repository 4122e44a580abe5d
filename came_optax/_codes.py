"""Arrays as 8- or 4-bit codes.

A matrix is divided by the smaller of its row's and its column's largest magnitude.
That is one scale per element for the price of a factored statistic: finer than blocks
of 64, no padding where no block divides an axis, and a sharding that follows from the
array's as the statistics' does.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from came_optax._factored_axes import FactoredAxes
from came_optax._packing import pack, unpack

Axes = tuple[int, ...]

_TOP = {8: 127, 4: 7}  # The largest code of so many bits; the smallest is its negative.
# Multiples of these over 2³² are, modulo 1, spread evenly: the first two along rows and
# columns (Roberts, "The unreasonable effectiveness of quasirandom sequences"), the
# golden ratio's over steps.
_ROW_STRIDE, _COL_STRIDE = 0xC13FA9A9, 0x91E10DA5
_STEP_STRIDE = np.uint32(0x9E3779B9)


class Codes(NamedTuple):
    """A leaf of the momentum in 8 or 4 bits.

    What they stand for is in the state that :func:`convert_state` makes for the same
    optimizer with ``mu_dtype=None``.

    Attributes:
      values: codes from −127 to 127, int8, of the leaf's shape; or from −7 to 7, two to
        a byte, uint8, of the leaf's shape with one axis halved and rounded up (rows to
        a multiple of 8).
      row_scale: largest magnitude in each row; the leaf's shape without ``col`` axes.
      col_scale: largest magnitude in each column; the leaf's shape without ``row``
        axes. Zeros of shape (1,) for a vector.
    """

    values: jax.Array
    row_scale: jax.Array
    col_scale: jax.Array

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return 4 if self.values.dtype == jnp.uint8 else 8


def reductions(axes: FactoredAxes, ndim: int) -> tuple[Axes, Axes | None]:
    """Returns the axes that the row and column scales are maxima over.

    Leaves that aren't factored are read as matrices of their last two axes. None
    stands for the column scale that a vector doesn't have.
    """
    if axes.factored:
        return axes.col, axes.row
    free = tuple(axis for axis in range(ndim) if axis not in axes.stack)
    return free[-1:], free[-2:-1] or None


def largest(x: jax.Array, over: Axes) -> jax.Array:
    """Returns the largest magnitudes over some axes."""
    return jnp.max(jnp.abs(x), over)


def encode(
    x: Callable[[], jax.Array],
    axes: FactoredAxes,
    bits: int,
    count: jax.Array,
    largest: Callable[[jax.Array, Axes], jax.Array] = largest,
) -> Codes:
    """Returns codes of x, rounded up or down by turns: on average they are x.

    To the nearest code momentum would never decay: nine tenths of a small one round to
    it again. Which way a number is rounded depends on its place in the leaf (in its
    slice of a stack) and on the step, evenly over both.

    Args:
      x: returns the leaf, real, which it may compute anew at each call.
      axes: the leaf's axes.
      bits: 8 or 4.
      count: number of updates with this one; shape (), int32.
      largest: computes what :func:`largest` does.
    """
    for_row = x()
    over_col, over_row = reductions(axes, for_row.ndim)
    row_scale = largest(for_row, over_col)
    col_scale = jnp.zeros((1,), row_scale.dtype)
    if over_row is not None:
        col_scale = largest(x(), over_row)
    leaf, top = x(), _TOP[bits]
    inverse = _of_elements(
        jnp.maximum, _inverse(row_scale), _inverse(col_scale), axes, leaf.ndim
    )
    magnitude = jnp.minimum(jnp.abs(leaf) * inverse, 1)
    code = top / 2 * (jnp.sqrt(1 + 8 * magnitude) - 1)
    # How far the number itself, not its code, is from one level to the next.
    low = jnp.floor(code)
    part = code - low
    code = low + part * (top + 2 * low + part) / (top + 2 * low + 1)
    thresholds = _thresholds(leaf, row_scale, col_scale, axes, count)
    values = jnp.floor(jnp.where(leaf < 0, -code, code) + thresholds).astype(jnp.int8)
    return Codes(pack(values) if bits == 4 else values, row_scale, col_scale)


def decode(codes: Codes, like: jax.Array, axes: FactoredAxes) -> jax.Array:
    """Returns on average what :func:`encode` was given, an array ``like`` it.

    Codes lie three times as close around 0, where most momentum is, as at ±1.
    """
    values = unpack(codes.values, like) if codes.bits == 4 else codes.values
    scale = _of_elements(jnp.minimum, codes.row_scale, codes.col_scale, axes, like.ndim)
    y = values.astype(scale.dtype) / _TOP[codes.bits]
    x: jax.Array = y * (1 + jnp.abs(y)) * (scale / 2)
    return x


def _inverse(scale: jax.Array) -> jax.Array:
    """Returns 1 / scale, and 0 where there is nothing but zeros.

    Slightly more, so that the largest magnitude has the largest code.
    """
    empty = scale < jnp.finfo(scale.dtype).tiny
    return jnp.where(empty, 0, (1 + 2.0**-20) / jnp.where(empty, 1, scale))


def _of_elements(
    choose: Callable[..., jax.Array],
    row: jax.Array,
    col: jax.Array,
    axes: FactoredAxes,
    ndim: int,
) -> jax.Array:
    """Returns what ``choose`` makes of each element's row's and column's scale."""
    over_col, over_row = reductions(axes, ndim)
    row = jnp.expand_dims(row, over_col)
    return row if over_row is None else choose(row, jnp.expand_dims(col, over_row))


def _thresholds(
    x: jax.Array,
    row_scale: jax.Array,
    col_scale: jax.Array,
    axes: FactoredAxes,
    count: jax.Array,
) -> jax.Array:
    """Returns a number in [0, 1) for each element of x, another at each step.

    It is the sum of one for its row and one for its column, modulo 1.
    """
    over_col, over_row = reductions(axes, x.ndim)
    rows = jnp.expand_dims(row_scale, over_col)
    cols = x if over_row is None else jnp.expand_dims(col_scale, over_row)
    of_cols = [axis for axis in over_col if axis not in axes.stack]
    of_rows = [axis for axis in range(x.ndim) if axis not in (*over_col, *axes.stack)]
    # Scales are never negative. That they might be keeps XLA from storing the numbers
    # for all leaves of a shape.
    turn = (rows < 0).astype(jnp.uint32) + count.astype(jnp.uint32) * _STEP_STRIDE
    turn = turn + _places(rows, of_rows, _ROW_STRIDE)
    turn = turn + _places(cols, of_cols, _COL_STRIDE)
    # So few bits that the largest code and the largest threshold have an exact sum in
    # float32, below the next code.
    thresholds: jax.Array = (turn >> 15).astype(x.dtype) * 2.0**-17
    return thresholds


def _places(like: jax.Array, axes: list[int], stride: int) -> jax.Array:
    """Returns ``stride`` times the place along ``axes``, as if they were one axis."""
    sharding = jax.typeof(like).sharding
    places: jax.Array = jnp.uint32(0)
    for axis in reversed(axes):
        place = jax.lax.broadcasted_iota(
            jnp.uint32, like.shape, axis, out_sharding=sharding
        )
        places = places + place * np.uint32(stride % 2**32)
        stride *= like.shape[axis]
    return places

"""The bits of a weight: those of a narrower parameter, and a remainder.

A weight is a sign and a magnitude of 31 bits, whose upper 15 are the parameter's and
whose lower 16 or 8 are the remainder: in bfloat16 float32's own bits, in float16 as if
its significand had more of them. All of it is done in integers: sums would flush
subnormal numbers to 0, and the parameter is not the weight rounded to even, as then two
weights half way between parameters would have the same remainder.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# What the remainder of a weight of so many bits is stored as.
REMAINDER: dict[int, Any] = {16: jnp.int8, 24: jnp.int8, 32: jnp.int16}
DOWN = np.uint32(0)  # The threshold with which magnitudes are rounded down.
_NAN = np.uint32(0x7FC00000)  # Its upper half is NaN in both dtypes.
_GOLDEN_RATIO = np.uint32(0x9E3779B9)  # Its multiples over 2³² are spread evenly.


def is_narrow(p: Any) -> bool:
    """Returns whether a parameter has fewer bits than a weight."""
    return p.dtype in (jnp.bfloat16, jnp.float16)


def upcast(x: Any, p: Any) -> Any:
    """Returns what belongs to a parameter in the dtype of its weight."""
    return x.astype(jnp.float32) if is_narrow(p) else x


def thresholds(weight: jax.Array, bits: int, count: jax.Array) -> jax.Array:
    """Returns what is added to each magnitude before it is cut to so many bits.

    It is spread evenly over the steps, from another start in each element.
    """
    if bits == 32:
        return jnp.asarray(DOWN)
    place = jnp.uint32(0)
    for axis, size in enumerate(weight.shape):
        place = place * np.uint32(size) + jax.lax.broadcasted_iota(
            jnp.uint32, weight.shape, axis, out_sharding=jax.typeof(weight).sharding
        )
    # Mixed as in MurmurHash3.
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        place = (place ^ (place >> shift)) * np.uint32(factor)
    place = place ^ (place >> 16)
    turn: jax.Array = place + count.astype(jnp.uint32) * _GOLDEN_RATIO
    return turn >> bits


def split(
    weight: jax.Array, dtype: Any, bits: int, threshold: Any
) -> tuple[jax.Array, jax.Array]:
    """Returns a parameter and what it lacks of a weight.

    Args:
      weight: float32, if ``dtype`` is narrower.
      dtype: the parameter's.
      bits: of both together.
      threshold: uint32, what is added to a magnitude before it is cut to ``bits``.
    """
    if weight.dtype == dtype:
        return weight, jnp.zeros((1,), REMAINDER[bits])
    magnitude = cut(weight, dtype, bits, threshold)
    p = nearest(weight, magnitude, dtype)
    return p, lacking(weight, magnitude, p, bits)


def cut(weight: jax.Array, dtype: Any, bits: int, threshold: Any) -> jax.Array:
    """Returns the magnitude of a weight that is rounded to so many bits, uint32."""
    magnitude = _magnitude(weight, dtype)
    rounded = (magnitude + threshold) & np.uint32(2**32 - 2 ** (32 - bits))
    return jnp.where(jnp.isfinite(weight), rounded, magnitude)


def nearest(weight: jax.Array, magnitude: jax.Array, dtype: Any) -> jax.Array:
    """Returns the parameter that is nearest to such a magnitude, of a weight's sign."""
    upper = (magnitude + np.uint32(0x8000)) >> 16
    sign = jnp.signbit(weight).astype(jnp.uint32) << 15
    return jax.lax.bitcast_convert_type((upper | sign).astype(jnp.uint16), dtype)


def lacking(
    weight: jax.Array, magnitude: jax.Array, p: jax.Array, bits: int
) -> jax.Array:
    """Returns what the nearest parameter lacks of such a magnitude."""
    if bits == 16:
        return jnp.zeros((1,), REMAINDER[bits])
    upper = _upper(p) & np.uint32(0x7FFF)
    lower = jax.lax.bitcast_convert_type(magnitude - (upper << 16), jnp.int32)
    lower = lower >> (32 - bits)
    # No update leads from 1 to −0: beside 0 the remainder has the sign.
    lower = jnp.where((upper == 0) & jnp.signbit(weight), ~lower, lower)
    return lower.astype(REMAINDER[bits])


def join(p: Any, remainder: jax.Array) -> jax.Array:
    """Returns the weight that was split."""
    weight: jax.Array = upcast(p, p)
    if not is_narrow(p) or remainder.shape != p.shape:
        return weight
    lower = remainder.astype(jnp.int32)
    upper = _upper(p)
    negative, upper = upper >> 15 == 1, upper & np.uint32(0x7FFF)
    negative = jnp.where(upper == 0, lower < 0, negative)
    lower = jnp.where((upper == 0) & negative, ~lower, lower)
    lower = lower << (16 - 8 * remainder.dtype.itemsize)
    magnitude = (upper << 16) + jax.lax.bitcast_convert_type(lower, jnp.uint32)
    sign = negative.astype(jnp.uint32) << 31
    joined = jax.lax.bitcast_convert_type(
        _float32_bits(magnitude, p.dtype) | sign, jnp.float32
    )
    finite = jnp.isfinite(p) | (~jnp.isnan(p) & (remainder < 0))
    return jnp.where(finite, joined, weight)


def _upper(p: jax.Array) -> jax.Array:
    """Returns a parameter's 16 bits, in the lower ones of uint32."""
    return jax.lax.bitcast_convert_type(p, jnp.uint16).astype(jnp.uint32)


def _magnitude(weight: jax.Array, dtype: Any) -> jax.Array:
    """Returns 31 bits of float32 numbers, the upper 15 as in ``dtype``."""
    magnitude = jax.lax.bitcast_convert_type(weight, jnp.uint32)
    magnitude = magnitude & np.uint32(0x7FFFFFFF)
    if dtype == jnp.float16:
        size = jnp.abs(weight)
        subnormal = jnp.round(jnp.minimum(size, 2.0**-14) * 2.0**40)
        normal = (magnitude << 3) - np.uint32((112 << 26) % 2**32)  # Exponents' bias.
        magnitude = jnp.where(
            size < 2.0**-14,
            subnormal.astype(jnp.uint32),
            jnp.where(size < 2.0**16, normal, np.uint32(0x7C000000)),
        )
    result: jax.Array = jnp.where(jnp.isnan(weight), _NAN, magnitude)
    return result


def _float32_bits(magnitude: jax.Array, dtype: Any) -> jax.Array:
    """Returns the bits of float32 numbers of which :func:`_magnitude` is given."""
    if dtype == jnp.bfloat16:
        return magnitude
    subnormal = magnitude.astype(jnp.float32) * 2.0**-40
    of_subnormal = jax.lax.bitcast_convert_type(subnormal, jnp.uint32)
    normal = (magnitude >> 3) + np.uint32(112 << 23)
    bits: jax.Array = jnp.where(magnitude < 2**26, of_subnormal, normal)
    return bits

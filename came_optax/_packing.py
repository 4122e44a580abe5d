"""Codes of 4 bits, two to a byte."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from came_optax._paths import Shape
from came_optax._specs import devices

_REGISTER_ROWS = 8  # Of a TPU's vector registers.
_MANY_ROWS = 1024  # Padding them to pairs of registers costs less than 1.5 %.


def pack(codes: jax.Array) -> jax.Array:
    """Returns 4-bit codes two to a byte, those of a pair as :func:`pairing` says."""
    axis, distance = pairing(codes.shape)
    before, n, after = _split(codes.shape, axis)
    bytes_ = packed_shape(codes.shape)[axis]
    sharding = jax.typeof(codes).sharding
    codes = _in_groups(codes, axis, bytes_ // distance)
    padding = [(0, int(i == axis) * (2 * bytes_ - n)) for i in range(codes.ndim)]
    pairs = jnp.pad(codes, padding).reshape(*before, -1, 2, distance, *after)
    low, high = (
        jax.lax.index_in_dim(pairs, i, axis + 1, keepdims=False) for i in (0, 1)
    )
    packed = ((low & 15) | (high << 4)).astype(jnp.uint8).reshape(*before, -1, *after)
    if bytes_ % devices(sharding.mesh, sharding.spec[axis]) == 0:
        packed = _resharded(packed, sharding)
    return packed


def unpack(packed: jax.Array, like: jax.Array) -> jax.Array:
    """Returns codes that were packed, shaped and sharded as ``like``.

    Both halves of a byte come from one broadcast and a shift, which compilers fuse with
    what follows; they would write a concatenation to memory.
    """
    axis, distance = pairing(like.shape)
    before, n, after = _split(like.shape, axis)
    packed = _in_groups(packed, axis, packed.shape[axis] // distance)
    pairs = packed.view(jnp.int8).reshape(*before, -1, 1, distance, *after)
    to_pairs = [1] * (axis + 1) + [2, 1] + [1] * len(after)
    left_shifts = jnp.array([4, 0], jnp.int8).reshape(to_pairs)
    codes = (pairs << left_shifts) >> 4  # An arithmetic shift keeps the sign.
    codes = codes.reshape(*before, -1, *after)
    codes = jax.lax.slice_in_dim(codes, 0, n, axis=axis)
    return _resharded(codes, jax.typeof(like).sharding)


def packed_shape(shape: Shape) -> Shape:
    """Returns the shape that :func:`pack` gives to codes of ``shape``."""
    axis, distance = pairing(shape)
    before, n, after = _split(shape, axis)
    return (*before, -(-n // (2 * distance)) * distance, *after)


def pairing(shape: Shape) -> tuple[int, int]:
    """Returns along which axis the codes that share a byte lie, and how far apart.

    Whatever the mesh, on which no state may depend, the halved axis should still divide
    among the devices that its whole does: hence not along 8 experts, heads or layers,
    which may be on 8 devices. Rows are best, and for TPUs those that are a vector
    register apart; many of them can be padded to whole registers. Then the axis that is
    divisible by the largest power of two; and if that is small an odd one, which can't
    be sharded, with padding.
    """
    rows = len(shape) - 2
    twos = [n & -n for n in shape]  # The largest power of two that divides each.
    if rows >= 0 and (
        twos[rows] >= 32 or (shape[rows] >= _MANY_ROWS and twos[rows] < 16)
    ):
        return rows, _REGISTER_ROWS
    axis = max(range(len(shape)), key=lambda axis: twos[axis])
    if twos[axis] < 16:
        odd = [a for a, n in enumerate(shape) if n % 2 and n >= _REGISTER_ROWS**2]
        axis = max(odd, key=lambda axis: shape[axis], default=axis)
    return axis, 1


def _split(shape: Shape, axis: int) -> tuple[Shape, int, Shape]:
    return shape[:axis], shape[axis], shape[axis + 1 :]


def _in_groups(x: jax.Array, axis: int, groups: int) -> jax.Array:
    """Returns ``x`` such that each group of pairs along ``axis`` is on one device.

    Only explicit meshes must be told; there, an axis whose groups don't divide among
    the devices is replicated.
    """
    sharding = jax.typeof(x).sharding
    if groups % devices(sharding.mesh, sharding.spec[axis]) == 0:
        return x
    spec = (None if i == axis else names for i, names in enumerate(sharding.spec))
    return _resharded(x, NamedSharding(sharding.mesh, PartitionSpec(*spec)))


def _resharded(x: jax.Array, sharding: Any) -> jax.Array:
    """Returns ``x`` with that sharding in its type, if there are explicit axes."""
    if not sharding.mesh.explicit_axes or jax.typeof(x).sharding == sharding:
        return x
    moved: jax.Array = jax.sharding.reshard(x, sharding)
    return moved

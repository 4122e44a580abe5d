"""For TPUs, whose cores keep arrays of tens of MiB in a memory of their own, VMEM.

XLA:TPU keeps there what is read again, but begins the first pass before its own copy
has arrived. A copy that it can't drop is one read of HBM instead of two or three.
"""

from typing import Any

import jax
import jax.numpy as jnp

from came_optax import _algorithm as algorithm
from came_optax._schedules import gpu
from came_optax._schedules.plain import Schedule, Token

_SMALL = 40 * 2**20  # Bytes; there are 64 MiB or more.


def normalize(g: Any, v: Any, h: Any, axes: Any, t: Any, token: Token) -> Any:
    """See :class:`Schedule`."""
    if axes.factored:
        g = on_chip(g, jnp.min(v.row) < 0)
    return *algorithm.normalize(g, v, h, axes, t), token


def stage(codes: jax.Array, v: Any, token: Token) -> jax.Array:
    """See :class:`Schedule`. All leaves' codes at once would leave no room on chip."""
    if isinstance(v, jax.Array):
        return codes
    return on_chip(codes, token if v is None else jnp.mean(v.row) < 0)


def on_chip(x: jax.Array, never: jax.Array) -> jax.Array:
    """Returns a copy of x, made when it is known that ``never`` is False."""
    if x.nbytes > _SMALL:
        return x
    copy: jax.Array = jax.lax.optimization_barrier(jnp.where(never, 0, x))
    return copy


TPU = Schedule(normalize=normalize, stage=stage, passes=gpu.passes)

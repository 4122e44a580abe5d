"""For TPUs, whose cores keep arrays of tens of MiB in a memory of their own, VMEM.

XLA:TPU keeps there what is read again, but begins the first pass before its own copy
has arrived. A copy that it can't drop is one read of HBM instead of two or three.
"""

import jax
import jax.numpy as jnp
from jax import Array

from came_optax import _algorithm as algorithm
from came_optax._algorithm import Factored, Hyperparameters, Statistic
from came_optax._factoring import FactoredAxes
from came_optax._schedules.plain import Schedule, Token, two_forms

_SMALL = 40 * 2**20  # Bytes; there are 64 MiB or more.


def normalize(
    g: Array,
    v: Statistic,
    h: Hyperparameters,
    axes: FactoredAxes,
    t: Array | None,
    token: Token,
) -> tuple[Array, Statistic, Token]:
    """See :class:`Schedule`."""
    if isinstance(v, Factored):
        g = on_chip(g, token.own)
    return *algorithm.normalize(g, v, h, axes, t), token


def stage(codes: Array, v: Statistic | None, token: Token) -> Array:
    """See :class:`Schedule`. All leaves' codes at once would leave no room on chip."""
    if isinstance(v, Factored):
        return on_chip(codes, jnp.mean(v.row) < 0)
    return codes if v is not None else on_chip(codes, token.before)


def on_chip(x: Array, never: Array) -> Array:
    """Returns a copy of x, made when it is known that ``never`` is False."""
    if x.nbytes > _SMALL:
        return x
    copy: Array = jax.lax.optimization_barrier(jnp.where(never, 0, x))
    return copy


TPU = Schedule(normalize=normalize, stage=stage, passes=two_forms)

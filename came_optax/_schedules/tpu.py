"""For TPUs, whose cores keep arrays of tens of MiB in a memory of their own, VMEM.

XLA:TPU keeps there what is read again, but begins the first pass before its own copy
has arrived. A copy that it can't drop is one read of HBM instead of two or three.
"""

import jax
import jax.numpy as jnp
from jax import Array

from came_optax._algorithm import Factored, Hyperparameters, Seen, Statistic
from came_optax._factored_axes import FactoredAxes
from came_optax._momentum import Lazy
from came_optax._schedules import plain
from came_optax._schedules.plain import Schedule

_VMEM_BUDGET = 40 * 2**20  # Bytes; there are 64 MiB or more.


def normalize(
    g: Array,
    v: Statistic,
    h: Hyperparameters,
    axes: FactoredAxes,
    seen: Seen | None,
) -> tuple[Lazy, Statistic]:
    """See :class:`Schedule`."""
    if isinstance(v, Factored) and g.nbytes <= _VMEM_BUDGET:
        # No row statistic is negative, but XLA can't know, and has to make the copy.
        row = jnp.expand_dims(v.row, axes.col)
        g = jax.lax.optimization_barrier(jnp.where(row < 0, jnp.sqrt(row), g))
    return plain.normalize(g, v, h, axes, seen)


TPU = Schedule(normalize=normalize)

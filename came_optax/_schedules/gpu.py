"""For GPUs, where means over rows and over columns take a pass over memory each.

Once the columns' are known, the pass for the rows' has the RMS of u as well.
"""

import jax.numpy as jnp
from jax import Array

from came_optax import _algorithm as algorithm
from came_optax._algorithm import Factored, Hyperparameters, Seen, Statistic
from came_optax._factored_axes import FactoredAxes
from came_optax._momentum import Lazy
from came_optax._schedules import plain
from came_optax._schedules.plain import Schedule


def normalize(
    g: Array,
    v: Statistic,
    h: Hyperparameters,
    axes: FactoredAxes,
    seen: Seen | None,
) -> tuple[Lazy, Statistic]:
    """See :class:`Schedule`."""
    if not isinstance(v, Factored) or h.clip is None:
        return plain.normalize(g, v, h, axes, seen)
    new = algorithm.average(v, algorithm.mean_square(g, h.eps1, axes), h.b2)
    of_row, of_col = algorithm.inverse_roots(new, axes)
    mean_of_row = jnp.mean(algorithm.square(g * of_col), axes.col, keepdims=True)
    rms_of_row = jnp.sqrt(mean_of_row) * of_row
    if seen is not None:
        rms_of_row = rms_of_row * jnp.sqrt(seen.b2)
    u = algorithm.whiten(g, new, h, axes, seen)
    u = u / algorithm.excess(rms_of_row, h.clip, axes)
    return lambda: u, new


GPU = Schedule(normalize=normalize)

"""For GPUs, where rows and columns take a pass over memory each.

XLA:GPU stores an array that two passes share. What it can compute from arrays that are
in memory anyway it computes again: the second pass asks for the same number in another
form.
"""

from typing import Any

import jax

from came_optax import _algorithm as algorithm
from came_optax._schedules.plain import Schedule, Token


def confide(
    u: Any, m: Any, s: Any, h: Any, axes: Any, t: Any, token: Token, coded: bool
) -> Any:
    """See :class:`Schedule`."""
    new = algorithm.average(m, u, h.b1)
    if s is not None:
        for_row, for_col = passes(new, m, u, h.b1)
        if not coded:
            for_row = new  # The first pass stores it.
        row, _ = algorithm.mean_square(u - for_row, h.eps2, axes)
        _, col = algorithm.mean_square(u - for_col, h.eps2, axes)
        s = algorithm.average(s, algorithm.Factored(row, col), h.b3)
    delta = algorithm.trust(new, u, s, h, axes, t)
    return algorithm.clip(delta, h.update_clip, axes), new, s, token


def passes(m: jax.Array, old_m: jax.Array, u: jax.Array, b1: Any) -> Any:
    """Returns the moving average of m and u in two forms; see :class:`Schedule`."""
    del m
    change = old_m - u
    return old_m - (1 - b1) * change, u + b1 * change


GPU = Schedule(confide=confide, passes=passes)

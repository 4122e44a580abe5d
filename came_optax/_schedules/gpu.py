"""For GPUs, where rows and columns take a pass over memory each.

XLA:GPU stores an array that two passes share. What it can compute from arrays that are
in memory anyway it computes again: the second pass asks for the same number in another
form.
"""

from jax import Array

from came_optax import _algorithm as algorithm
from came_optax._algorithm import Factored, Hyperparameters
from came_optax._factoring import FactoredAxes
from came_optax._schedules.plain import Schedule, Token
from came_optax._schedules.plain import two_forms as passes


def confide(
    u: Array,
    m: Array,
    s: Factored | None,
    h: Hyperparameters,
    axes: FactoredAxes,
    t: Array | None,
    token: Token,
    coded: bool,
) -> tuple[Array, Array, Factored | None, Token]:
    """See :class:`Schedule`."""
    new = algorithm.average(m, u, h.b1)
    if s is not None:
        for_row, for_col = passes(new, m, u, h.b1)
        if not coded:
            for_row = new  # The first pass stores it.
        row, _ = algorithm.mean_square(u - for_row, h.eps2, axes)
        _, col = algorithm.mean_square(u - for_col, h.eps2, axes)
        s = algorithm.average(s, Factored(row, col), h.b3)
    delta = algorithm.trust(new, u, s, h, axes, t)
    return algorithm.clip(delta, h.update_clip, axes), new, s, token


GPU = Schedule(confide=confide, passes=passes)

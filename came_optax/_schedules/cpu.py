"""For CPUs, where fresh memory costs more than arithmetic.

XLA:CPU would store what two passes share, and work on all leaves at once, with
temporaries for each. Here each leaf waits for a token from the one before; what the
second pass needs is computed again, behind a barrier, which keeps XLA from finding that
it is the same; and u − m is stored in the place of m, and the new m in the place of
that.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array

from came_optax import _algorithm as algorithm
from came_optax._algorithm import Factored, Hyperparameters, Statistic
from came_optax._factoring import FactoredAxes
from came_optax._schedules.plain import Schedule, Token, known

T = TypeVar("T")


def normalize(
    g: Array,
    v: Statistic,
    h: Hyperparameters,
    axes: FactoredAxes,
    t: Array | None,
    token: Token,
) -> tuple[Array, Statistic, Token]:
    """See :class:`Schedule`."""
    if not isinstance(v, Factored):
        v = algorithm.average(v, algorithm.mean_square(g, h.eps1, axes), h.b2)
    else:
        decay = after(token, h.b2)
        row = mean_square(g, axes.col, h.eps1)
        # A factor, as what a select makes of g would be stored.
        col = mean_square(after(token, 1 + 0 * h.b2) * apart(g), axes.row, h.eps1)
        new: Factored = algorithm.average(v, Factored(row, col), decay)
        v, token = new, token._replace(before=known(jnp.mean(new.row)))

    def whiten(g: Array, v: Statistic) -> Array:
        return algorithm.whiten(g, v, h, axes, t)

    return clip_computed_twice(whiten, (g, v), h.clip, axes), v, token


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
    del coded
    if s is None:
        m = algorithm.average(m, u, h.b1)
    else:
        u = after(token, u)
        change = u - m  # u − m, for the new m, is b1 times this.
        stored = apart(change)
        row = mean_square(change, axes.col, h.eps2, h.b1)
        col = mean_square(stored, axes.row, h.eps2, h.b1)
        s = algorithm.average(s, Factored(row, col), h.b3)
        token = token._replace(before=known(s.row, s.col))
        m = jnp.where(jnp.isfinite(u), u - after(token, h.b1) * stored, u)  # Not ∞ − ∞.

    def trust(m: Array, u: Array, s: Factored | None) -> Array:
        return algorithm.trust(m, u, s, h, axes, t)

    delta = clip_computed_twice(trust, (m, u, s), h.update_clip, axes)
    return delta, m, s, token


def mean_square(
    x: Array, over: tuple[int, ...], eps: Array, factor: Array | int = 1
) -> Array:
    """Returns the mean of |factor · x|² + ε; the sum of |x|² alone isn't stored."""
    return algorithm.bounded(factor**2 * jnp.mean(algorithm.square(x), over) + eps)


def clip_computed_twice(
    compute: Callable[..., Array],
    arguments: tuple[Any, ...],
    threshold: Array | None,
    axes: FactoredAxes,
) -> Array:
    """Returns what ``compute`` returns, clipped; its RMS is that of another call."""
    u = compute(*arguments)
    if threshold is None:
        return u
    return u / algorithm.excess(compute(*apart(arguments)), threshold, axes)


def apart(xs: T) -> T:
    """Returns arrays whose uses share nothing with other uses of them."""
    same: T = jax.lax.optimization_barrier(xs)
    return same


def after(token: Token, x: Array) -> Array:
    """Returns x, not before the token is known: XLA can't know that it is False."""
    return jnp.where(token.before, 0, x)


def passes(m: Array, old_m: Array, u: Array, b1: Array) -> tuple[Array, Array]:
    """See :class:`Schedule`."""
    del old_m, u
    return apart(m), apart((m, b1))[0]  # Not the same barrier twice.


CPU = Schedule(normalize=normalize, confide=confide, passes=passes)

"""For CPUs, where fresh memory costs more than arithmetic.

XLA:CPU would store what two passes share, and work on all leaves at once, with
temporaries for each. Here each leaf waits for a token from the one before; what the
second pass needs is computed again, behind a barrier, which keeps XLA from finding that
it is the same; and u − m is stored in the place of m, and the new m in the place of
that.
"""

from typing import Any

import jax
import jax.numpy as jnp

from came_optax import _algorithm as algorithm
from came_optax._schedules.plain import Schedule, Token


def normalize(g: Any, v: Any, h: Any, axes: Any, t: Any, token: Token) -> Any:
    """See :class:`Schedule`."""
    if not axes.factored:
        v = algorithm.average(v, algorithm.mean_square(g, h.eps1, axes), h.b2)
    else:
        decay = after(token, h.b2)
        row = mean_square(g, axes.col, h.eps1)
        # A factor, as what a select makes of g would be stored.
        col = mean_square(after(token, 1 + 0 * h.b2) * apart(g), axes.row, h.eps1)
        v = algorithm.average(v, algorithm.Factored(row, col), decay)
        token = known(jnp.mean(v.row))

    def whiten(g: jax.Array, v: Any) -> jax.Array:
        return algorithm.whiten(g, v, h, axes, t)

    return clip_computed_twice(whiten, (g, v), h.clip, axes), v, token


def confide(
    u: Any, m: Any, s: Any, h: Any, axes: Any, t: Any, token: Token, coded: bool
) -> Any:
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
        s = algorithm.average(s, algorithm.Factored(row, col), h.b3)
        token = known(s.row, s.col)
        m = jnp.where(jnp.isfinite(u), u - after(token, h.b1) * stored, u)  # Not ∞ − ∞.

    def trust(m: jax.Array, u: jax.Array, s: Any) -> jax.Array:
        return algorithm.trust(m, u, s, h, axes, t)

    delta = clip_computed_twice(trust, (m, u, s), h.update_clip, axes)
    return delta, m, s, token


def mean_square(x: jax.Array, over: Any, eps: Any, factor: Any = 1) -> jax.Array:
    """Returns the mean of |factor · x|² + ε; the sum of |x|² alone isn't stored."""
    return algorithm.bounded(factor**2 * jnp.mean(algorithm.square(x), over) + eps)


def clip_computed_twice(compute: Any, arguments: Any, threshold: Any, axes: Any) -> Any:
    """Returns what ``compute`` returns, clipped; its RMS is that of another call."""
    u = compute(*arguments)
    if threshold is None:
        return u
    return u / algorithm.excess(compute(*apart(arguments)), threshold, axes)


def apart(xs: Any) -> Any:
    """Returns arrays whose uses share nothing with other uses of them."""
    return jax.lax.optimization_barrier(xs)


def after(token: Token, x: jax.Array) -> jax.Array:
    """Returns x, not before the token is known: XLA can't know that it is False."""
    return jnp.where(token, 0, x)


def known(*statistics: jax.Array) -> Token:
    """Returns False when the statistics, which are positive, are known."""
    return jnp.any(jnp.stack([jnp.any(x < 0) for x in statistics]))


def passes(m: jax.Array, old_m: jax.Array, u: jax.Array, b1: Any) -> Any:
    """See :class:`Schedule`."""
    del old_m, u
    return apart(m), apart((m, b1))[0]  # Not the same barrier twice.


CPU = Schedule(normalize=normalize, confide=confide, passes=passes)

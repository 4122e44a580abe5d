"""For CPUs, where fresh memory costs more than arithmetic.

XLA:CPU stores what two passes over memory share. Here each pass computes the normalised
gradient again, from the gradient, which is in memory anyway; u − m is stored in the
place of m, and the new m in the place of that.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from came_optax import _algorithm as algorithm
from came_optax._algorithm import Factored, Hyperparameters, Seen, Statistic
from came_optax._codes import Codes
from came_optax._factored_axes import FactoredAxes
from came_optax._momentum import Lazy, Storage, Stored
from came_optax._schedules import plain
from came_optax._schedules.plain import Schedule

T = TypeVar("T")


def normalize(
    g: Array,
    v: Statistic,
    h: Hyperparameters,
    axes: FactoredAxes,
    seen: Seen | None,
) -> tuple[Lazy, Statistic]:
    """See :class:`Schedule`."""
    if not isinstance(v, Factored):
        return plain.normalize(g, v, h, axes, seen)
    v = algorithm.average(
        v, mean_square(recomputed(lambda g: g, g), h.eps1, axes), h.b2
    )
    of_row, of_col = algorithm.inverse_roots(v, axes)
    if seen is not None:
        of_row = of_row * jnp.sqrt(seen.b2)
    if h.clip is not None:
        u = recomputed(product, g, of_row, of_col)()
        of_row = of_row / algorithm.excess(u, h.clip, axes)
    return recomputed(product, g, of_row, of_col), v


def confide(
    u: Lazy,
    mu: Stored,
    s: Factored | None,
    h: Hyperparameters,
    axes: FactoredAxes,
    seen: Seen | None,
    storage: Storage,
    token: Array,
) -> tuple[Array, Stored, Factored | None]:
    """See :class:`Schedule`."""
    if s is None:
        if isinstance(mu, Codes):  # As below, a leaf waits for the one before.
            h = dataclasses.replace(h, b1=when_known(h.b1, token))
        return plain.confide(u, mu, s, h, axes, seen, storage, token)

    old_m = storage.load(mu)
    if not storage.in_place(mu):
        # The change needs a place: that of the leaf before, which has to be done.
        old_m = when_known(old_m, token)
    change = u() - old_m  # u − m, for the new m, is b1 times this.
    new = mean_square(recomputed(lambda x: x, change), h.eps2, axes, h.b1)
    s = algorithm.average(s, new, h.b3)
    # The new momentum takes the place of the change, which has to be read before.
    b1 = when_known(h.b1, jnp.mean(s.row) + jnp.mean(s.col))
    one_u = u()
    new_m = jnp.where(jnp.isfinite(one_u), one_u - b1 * change, one_u)  # Not ∞ − ∞.
    new_mu, m = storage.store(lambda: new_m, mu, largest)
    trust = functools.partial(algorithm.trust, axes=axes, seen=seen)
    delta = trust(m(), u(), s, h)
    if h.update_clip is not None:
        again = recomputed(trust, m(), u(), s, h)()
        delta = delta * (1 / algorithm.excess(again, h.update_clip, axes))
    return delta, new_mu, s


def mean_square(
    x: Lazy, eps: Array, axes: FactoredAxes, factor: Array | float = 1
) -> Factored:
    """Returns means of |factor · x|² + ε over columns and over rows, by a pass each."""

    def over(some: tuple[int, ...]) -> Array:
        mean = factor**2 * jnp.mean(algorithm.square(x()), some)
        return algorithm.bounded(mean + eps)

    return Factored(over(axes.col), over(axes.row))


def product(g: Array, of_row: Array, of_col: Array) -> Array:
    """Returns the gradient divided by the root of its second moment."""
    return g * of_row * of_col


def recomputed(function: Callable[..., T], *inputs: Any) -> Callable[[], T]:
    """Returns ``function`` of the inputs, to be computed anew at each call.

    XLA looks for what is the same, but not through barriers of which no two are alike.
    """
    calls = itertools.count()

    def compute() -> T:
        number = np.int32(next(calls))
        own, _ = jax.lax.optimization_barrier((inputs, number))
        return function(*own)

    return compute


def when_known(x: Array, other: Array) -> Array:
    """Returns x, not before the other is known: which is ≥ 0, but XLA can't know."""
    return jnp.where(other < 0, jnp.sqrt(other), x)


def largest(x: Array, over: tuple[int, ...]) -> Array:
    """Returns the largest magnitudes; what XLA stores on the way is x, not |x|."""
    return jnp.maximum(jnp.max(x, over), -jnp.min(x, over))


CPU = Schedule(normalize=normalize, confide=confide)

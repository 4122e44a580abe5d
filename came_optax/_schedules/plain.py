"""The algorithm as it is written, for platforms without a schedule of their own."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jax import Array

from came_optax import _algorithm as algorithm
from came_optax._algorithm import Factored, Hyperparameters, Seen, Statistic
from came_optax._factored_axes import FactoredAxes
from came_optax._momentum import Lazy, Storage, Stored


def normalize(
    g: Array,
    v: Statistic,
    h: Hyperparameters,
    axes: FactoredAxes,
    seen: Seen | None,
) -> tuple[Lazy, Statistic]:
    """Returns what :func:`came_optax._algorithm.normalize` does, u when called."""
    u, v = algorithm.normalize(g, v, h, axes, seen)
    return lambda: u, v


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
    """Returns what :func:`came_optax._algorithm.confide` does, with m stored as mu."""
    del token
    delta, m, s = algorithm.confide(u(), storage.load(mu), s, h, axes, seen)
    new_mu, _ = storage.store(lambda: m, mu)
    return delta, new_mu, s


class Schedule(NamedTuple):
    """The algorithm's two halves.

    Attributes:
      normalize: ``(g, v, h, axes, seen) -> (u, v)``.
      confide: ``(u, mu, s, h, axes, seen, storage, token) -> (delta, mu, s)``. A token
        is a number ≥ 0 that is known once the leaf before is done, for whoever has a
        leaf wait for it.
    """

    normalize: Callable[..., Any] = normalize
    confide: Callable[..., Any] = confide


PLAIN = Schedule()

"""The algorithm as it is written, for platforms without a schedule of their own."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from came_optax import _algorithm as algorithm
from came_optax._algorithm import Factored, Hyperparameters, Statistic
from came_optax._factoring import FactoredAxes


class Token(NamedTuple):
    """What is False, but compilers can't know; both of shape ().

    Attributes:
      before: known when what comes before is done, the previous leaf at first.
      own: known from the start, and this leaf's own.
    """

    before: Array
    own: Array


def normalize(
    g: Array,
    v: Statistic,
    h: Hyperparameters,
    axes: FactoredAxes,
    t: Array | None,
    token: Token,
) -> tuple[Array, Statistic, Token]:
    """Returns u, v and the token of :func:`came_optax._algorithm.normalize`."""
    return *algorithm.normalize(g, v, h, axes, t), token


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
    """Returns the update, m, s and token of :func:`came_optax._algorithm.confide`."""
    del coded
    return *algorithm.confide(u, m, s, h, axes, t), token


def stage(codes: Array, v: Statistic | None, token: Token) -> Array:
    """Returns stored codes as they are to be read."""
    del v, token
    return codes


def passes(m: Array, old_m: Array, u: Array, b1: Array) -> tuple[Array, Array]:
    """Returns the new momentum as the row and as the column scales are to read it."""
    del old_m, u, b1
    return m, m


def two_forms(m: Array, old_m: Array, u: Array, b1: Array) -> tuple[Array, Array]:
    """Returns the new momentum in two forms, which XLA doesn't know to be equal."""
    del m
    change = old_m - u
    return old_m - (1 - b1) * change, u + b1 * change


def known(*statistics: Array) -> Array:
    """Returns False when the statistics, which are positive, are known."""
    return jnp.any(jnp.stack([jnp.any(x < 0) for x in statistics]))


class Schedule(NamedTuple):
    """The algorithm's two halves and two steps of low-bit storage.

    Attributes:
      normalize: ``(g, v, h, axes, t, token) -> (u, v, token)``.
      confide: ``(u, m, s, h, axes, t, token, coded) -> (delta, m, s, token)``; m will
        be ``coded``, or stored as an array.
      stage: ``(codes, v, token) -> codes``, before they are decoded; v is the second
        moment that the first half returned, or None without a first half.
      passes: ``(m, old_m, u, b1) -> (m, m)``, before the scales of rows and of columns
        are taken of it.
    """

    normalize: Callable[..., Any] = normalize
    confide: Callable[..., Any] = confide
    stage: Callable[..., Array] = stage
    passes: Callable[..., Any] = passes


PLAIN = Schedule()

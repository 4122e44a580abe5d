"""The algorithm as it is written, for platforms without a schedule of their own."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from came_optax import _algorithm as algorithm

# False, which compilers can't know. A schedule hands it from leaf to leaf.
Token = jax.Array


def normalize(g: Any, v: Any, h: Any, axes: Any, t: Any, token: Token) -> Any:
    """Returns u, v and the token of :func:`came_optax._algorithm.normalize`."""
    return *algorithm.normalize(g, v, h, axes, t), token


def confide(
    u: Any, m: Any, s: Any, h: Any, axes: Any, t: Any, token: Token, coded: bool
) -> Any:
    """Returns the update, m, s and token of :func:`came_optax._algorithm.confide`."""
    del coded
    return *algorithm.confide(u, m, s, h, axes, t), token


def stage(codes: jax.Array, v: Any, token: Token) -> jax.Array:
    """Returns stored codes as they are to be read."""
    del v, token
    return codes


def passes(m: jax.Array, old_m: jax.Array, u: jax.Array, b1: Any) -> Any:
    """Returns the new momentum as the row and as the column scales are to read it."""
    del old_m, u, b1
    return m, m


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
    stage: Callable[..., jax.Array] = stage
    passes: Callable[..., Any] = passes


PLAIN = Schedule()

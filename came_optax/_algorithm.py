"""CAME (Luo et al., 2023), Algorithm 2, for one leaf.

g is the gradient, u the update, m the momentum, v the second moment, s the instability
and ``seen`` what averages have seen, or None for no bias correction. Statistics are
means of squares: of rows and of columns, or the square itself where a leaf isn't
factored; such a leaf has no instability (None). Nothing here knows of trees, of storage
or of compilers.
"""

import dataclasses
import functools
from typing import Any, NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp

from came_optax._factored_axes import FactoredAxes


class Factored(NamedTuple):
    """A statistic of a matrix, as its row and its column means."""

    row: jax.Array  # Over the column axes.
    col: jax.Array  # Over the row axes.


Statistic: TypeAlias = jax.Array | Factored
Arrays = TypeVar("Arrays")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["b1", "b2", "b3", "eps1", "eps2", "clip", "update_clip"],
    meta_fields=["nesterov"],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Hyperparameters:
    """The paper's β, ε and d, real scalars, and two options beyond it."""

    b1: Any = 0.9
    b2: Any = 0.999
    b3: Any = 0.9999
    eps1: Any = 1e-30
    eps2: Any = 1e-16
    clip: Any | None = 1.0
    update_clip: Any | None = None
    nesterov: bool = False


class Seen(NamedTuple):
    """The weight 1 − βᵗ of what averages that began at zero have seen in t steps."""

    b1: jax.Array
    b1_ahead: jax.Array  # One step later.
    b2: jax.Array
    b3: jax.Array


def seen_after(t: jax.Array, h: Hyperparameters) -> Seen:
    """Returns what averages have seen after t steps."""

    def weight(decay: jax.Array, t: jax.Array) -> jax.Array:
        smallest = jnp.finfo(decay.dtype).eps  # Of a β whose 1 − β isn't 1.
        return -jnp.expm1(t * jnp.log1p(jnp.maximum(decay, smallest) - 1))

    return Seen(
        weight(h.b1, t),
        weight(h.b1, t + 1),
        weight(h.b2, t),
        jnp.where(h.b1 > 0, weight(h.b3, t), 1),  # Without momentum s isn't used.
    )


def normalize(
    g: jax.Array,
    v: Statistic,
    h: Hyperparameters,
    axes: FactoredAxes,
    seen: Seen | None = None,
) -> tuple[jax.Array, Statistic]:
    """First half: returns u = g / sqrt(v), clipped, and the new v."""
    v = average(v, mean_square(g, h.eps1, axes), h.b2)
    return clip(whiten(g, v, h, axes, seen), h.clip, axes), v


def confide(
    u: jax.Array,
    m: jax.Array,
    s: Factored | None,
    h: Hyperparameters,
    axes: FactoredAxes,
    seen: Seen | None = None,
) -> tuple[jax.Array, jax.Array, Factored | None]:
    """Second half: returns m / sqrt(s), the new m and the new s, of (u − m)²."""
    m = average(m, u, h.b1)
    if s is not None:
        s = average(s, mean_square(u - m, h.eps2, axes), h.b3)
    return clip(trust(m, u, s, h, axes, seen), h.update_clip, axes), m, s


def whiten(
    g: jax.Array,
    v: Statistic,
    h: Hyperparameters,
    axes: FactoredAxes,
    seen: Seen | None,
) -> jax.Array:
    """Returns g / sqrt(v), with v corrected for its start at zero."""
    u = divide_by_root(g, v, axes)
    return u if seen is None else u * jnp.sqrt(seen.b2)


def trust(
    m: jax.Array,
    u: jax.Array,
    s: Factored | None,
    h: Hyperparameters,
    axes: FactoredAxes,
    seen: Seen | None,
) -> jax.Array:
    """Returns m / sqrt(s), one step ahead if asked, both corrected for their start."""
    if h.nesterov:
        ahead, now = (1.0, 1.0) if seen is None else (seen.b1_ahead, seen.b1)
        m = h.b1 / ahead * m + (1 - h.b1) / now * u
    elif seen is not None:
        m = m / seen.b1
    if s is None:
        return m
    # Without momentum u − m is 0 and says nothing: then all are trusted alike.
    s = jax.tree.map(lambda x: jnp.where(h.b1 > 0, x, 1.0), s)
    delta = divide_by_root(m, s, axes)
    return delta if seen is None else delta * jnp.sqrt(seen.b3)


def average(old: Arrays, new: Any, decay: jax.Array) -> Arrays:
    """Returns the moving average β · old + (1 − β) · new."""
    averages: Arrays = jax.tree.map(lambda x, y: decay * x + (1 - decay) * y, old, new)
    return averages


def mean_square(x: jax.Array, eps: jax.Array, axes: FactoredAxes) -> Statistic:
    """Returns the means of |x|² + ε over columns and over rows, or |x|² + ε."""
    if not axes.factored:
        return bounded(square(x) + eps)
    return Factored(
        bounded(jnp.mean(square(x), axes.col) + eps),
        bounded(jnp.mean(square(x), axes.row) + eps),
    )


def divide_by_root(x: jax.Array, statistic: Statistic, axes: FactoredAxes) -> jax.Array:
    """Returns x / sqrt(row colᵀ / mean(row)), factor by factor, each of them finite.

    Their product need not be: a row and a column may both have been zero until now.
    """
    if not isinstance(statistic, Factored):
        return x * jax.lax.rsqrt(statistic)
    of_row, of_col = inverse_roots(statistic, axes)
    return x * of_row * of_col


def inverse_roots(
    statistic: Factored, axes: FactoredAxes
) -> tuple[jax.Array, jax.Array]:
    """Returns sqrt(mean(row) / row) and 1 / sqrt(col), to multiply the leaf by."""
    row = jnp.expand_dims(statistic.row, axes.col)
    col = jnp.expand_dims(statistic.col, axes.row)
    mean = jnp.mean(row, axes.row, keepdims=True)
    return jnp.sqrt(mean) * jax.lax.rsqrt(row), jax.lax.rsqrt(col)


def clip(u: jax.Array, threshold: Any | None, axes: FactoredAxes) -> jax.Array:
    """Returns u / max(1, RMS(u) / d): by block RMS, the slices of a stack apart."""
    return u if threshold is None else u / excess(u, threshold, axes)


def excess(u: jax.Array, threshold: Any, axes: FactoredAxes) -> jax.Array:
    """Returns max(1, RMS(u) / d), which broadcasts with u."""
    block = tuple(axis for axis in range(u.ndim) if axis not in axes.stack)
    # XLA:GPU moves more memory if the mean itself keeps the dimensions.
    rms = jnp.expand_dims(jnp.sqrt(bounded(jnp.mean(square(u), block))), block)
    return jnp.maximum(1.0, rms / threshold)


def square(x: jax.Array) -> jax.Array:
    """Returns |x|², which is real for complex x too."""
    return jnp.real(x * jnp.conj(x))


def bounded(x: jax.Array) -> jax.Array:
    """Saturates where a sum of x would overflow, so that no statistic is infinite."""
    return jnp.minimum(x, jnp.finfo(x.dtype).max / (2 * max(x.size, 1)))

"""The moving average of the first moment, and what it leaves of the update.

The algorithm is m ← β₁ m + (1 − β₁) u and the residual u − m. How each is computed
decides what XLA stores, and so how often memory is read.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from came_optax._statistics import in_turn, moving_average


class Residuals(NamedTuple):
    """u − m of one leaf, as its statistics are computed from it.

    Attributes:
      for_row: (u − m) / factor, for the statistics of rows.
      for_col: (u − m) / factor, for the statistics of columns.
      factor: shape (), float32.
    """

    for_row: jax.Array
    for_col: jax.Array
    factor: jax.Array


def residuals(
    old_m: jax.Array, u: jax.Array, decay: jax.Array, is_quantized: bool
) -> Residuals:
    """Returns u − m, where m is the moving average of ``old_m`` and ``u``.

    On CPUs u − old m is stored in the place of ``old_m``, and ``m`` in the place of
    that: without another array, whose fresh pages would cost more than the pass. For
    GPUs see :func:`by_other_formulas`.
    """

    def default(old_m: jax.Array, u: jax.Array, decay: jax.Array) -> Residuals:
        residual = u - moving_average(old_m, u, decay)
        return Residuals(residual, residual, jnp.ones_like(decay))

    def recomputed(old_m: jax.Array, u: jax.Array, decay: jax.Array) -> Residuals:
        m = moving_average(old_m, u, decay)
        for_row, for_col = by_other_formulas(m, old_m, u, decay, is_quantized)
        return Residuals(u - for_row, u - for_col, jnp.ones_like(decay))

    def in_place(old_m: jax.Array, u: jax.Array, decay: jax.Array) -> Residuals:
        change = u - old_m
        return Residuals(change, jax.lax.optimization_barrier(change), decay)

    found: Residuals = jax.lax.platform_dependent(
        old_m, u, decay, cpu=in_place, cuda=recomputed, default=default
    )
    return found


def average(
    old_m: jax.Array,
    u: jax.Array,
    decay: jax.Array,
    residual: jax.Array,
    turn: jax.Array,
) -> jax.Array:
    """Returns the moving average of ``old_m`` and ``u``.

    Args:
      old_m: the momentum until now.
      u: the update.
      decay: the decay rate, b1.
      residual: what :func:`residuals` returned for columns.
      turn: known when the statistics are, which on CPUs are computed first, so that the
        residual's memory is free for the result.
    """

    def in_place(
        old_m: jax.Array,
        u: jax.Array,
        decay: jax.Array,
        change: jax.Array,
        turn: jax.Array,
    ) -> jax.Array:
        m = u - in_turn(decay, turn).astype(u.dtype) * change
        return jnp.where(jnp.isfinite(u), m, u)  # Not ∞ - ∞.

    m: jax.Array = jax.lax.platform_dependent(
        old_m,
        u,
        decay,
        residual,
        turn,
        cpu=in_place,
        default=lambda old_m, u, decay, *_: moving_average(old_m, u, decay),
    )
    return m


def by_other_formulas(
    m: jax.Array, old_m: jax.Array, u: jax.Array, decay: jax.Array, is_quantized: bool
) -> tuple[jax.Array, jax.Array]:
    """Returns ``m``, the moving average of ``old_m`` and ``u``, by two other formulas.

    On GPUs the statistics of rows and of columns take a pass over memory each, and on
    all accelerators the maxima for codes come after them. XLA would store ``m`` for
    these and for the update; what it takes for other numbers it computes from what is
    in memory anyway. That saves 7 of 50 bytes per parameter on an H100 with int8. Where
    the first pass stores ``m`` all the same, it doesn't pay.
    """
    change, decay = old_m - u, decay.astype(u.dtype)
    for_row = old_m - (1 - decay) * change
    return for_row if is_quantized else m, u + decay * change

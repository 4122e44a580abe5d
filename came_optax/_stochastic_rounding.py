"""Parameter updates rounded stochastically, so that narrow floats keep their mean."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from came_optax._checks import check_key
from came_optax._paths import KeyPath, path_name


def stochastic_apply_updates(
    params: optax.Params, updates: optax.Updates, key: jax.Array
) -> optax.Params:
    """Applies updates like ``optax.apply_updates``, rounding stochastically.

    A bfloat16 number near 1 is 1/128 from the next: rounded to the nearest, a step of
    1e-3 is lost, however often it is taken. Here the sum is computed in float32 and
    rounded up or down at random, up with a probability equal to the part of the gap
    that it covers, so that its mean is the exact sum. Other leaves than bfloat16 and
    float16 are exactly what ``optax.apply_updates`` returns.

    Args:
      params: the parameters, a tree of arrays.
      updates: a tree of the same structure.
      key: a key that no other step uses, as from ``jax.random.key``; on several devices
        the same on each.

    Returns:
      The new parameters, with the old ones' shapes and dtypes. Infinities and NaN pass,
      and sums beyond the dtype's range become infinite, as with rounding to nearest.

    Raises:
      ValueError: a leaf of ``updates`` has another shape than its parameter.
      TypeError: ``key`` is no single random key.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from came_optax import stochastic_apply_updates
      >>> params = {"scale": jnp.ones(1000, jnp.bfloat16)}
      >>> updates = {"scale": jnp.full(1000, 2e-3, jnp.bfloat16)}
      >>> params = stochastic_apply_updates(params, updates, jax.random.key(0))
      >>> float(params["scale"].min()), float(params["scale"].max())
      (1.0, 1.0078125)
      >>> bool(abs(params["scale"].astype(jnp.float32).mean() - 1.002) < 5e-4)
      True

    References:
      Gupta et al., `Deep learning with limited numerical precision
      <https://arxiv.org/abs/1502.02551>`_, 2015; Zamirai et al., `Revisiting bfloat16
      training <https://arxiv.org/abs/2010.06192>`_, 2020.
    """
    check_key("key", key)
    leaves = itertools.count()

    def apply(path: KeyPath, p: Any, u: Any) -> Any:
        leaf_key = jax.random.fold_in(key, next(leaves))
        if p is None:
            return None
        if u is None or p.shape != u.shape:
            raise ValueError(
                f"leaf {path_name(path)!r} has shape {p.shape} in the params and "
                f"{'none' if u is None else u.shape} in the updates"
            )
        if p.dtype not in (jnp.bfloat16, jnp.float16):
            return optax.apply_updates(p, u)
        exact = jnp.asarray(p, jnp.float32) + jnp.asarray(u, jnp.float32)
        return _round(exact, p.dtype, leaf_key)

    new: optax.Params = jax.tree.map_with_path(
        apply, params, updates, is_leaf=lambda x: x is None
    )
    return new


def _round(x: jax.Array, dtype: Any, key: jax.Array) -> jax.Array:
    """Rounds float32 to one of its two neighbours in ``dtype``."""
    nearest = x.astype(dtype)
    largest = jnp.finfo(dtype).max
    outwards = jnp.where(x < 0, -largest, largest)
    beyond = jnp.abs(nearest).astype(x.dtype) > jnp.abs(x)
    inner = jnp.where(beyond, jnp.nextafter(nearest, jnp.zeros_like(nearest)), nearest)
    outer = jnp.nextafter(inner, outwards)
    gap = jnp.abs(outer.astype(x.dtype) - inner.astype(x.dtype))
    beyond_inner = jnp.abs(x - inner.astype(x.dtype))
    # No gap: at the largest number, and at 0 where subnormal numbers are flushed.
    probability = beyond_inner / jnp.where(gap > 0, gap, 1)
    rounded = jnp.where(
        jax.random.uniform(key, x.shape, x.dtype) < probability, outer, inner
    )
    return jnp.where(jnp.isfinite(nearest), rounded, nearest)

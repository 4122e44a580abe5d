"""Clipping of a leaf's update by its root mean square."""

from typing import Any

import jax
import jax.numpy as jnp

from came_optax._factoring import FactoredAxes
from came_optax._statistics import mean_square


def clip_by_leaf_rms(
    u: jax.Array, axes: FactoredAxes, threshold: Any | None, again: jax.Array
) -> jax.Array:
    """Divides a leaf by max(1, RMS / threshold), slice by slice where stacked.

    Args:
      u: the leaf's update.
      axes: its axes; those of a stack hold independent parameters.
      threshold: the largest root mean square to let through; None clips nothing.
      again: ``u`` for the mean, see :func:`for_another_pass`.
    """
    if threshold is None or u.size == 0:
        return u
    shared = tuple(axis for axis in range(u.ndim) if axis not in axes.stack)
    rms = jnp.expand_dims(jnp.sqrt(mean_square(again, shared, 0.0)), shared)
    excess = rms / jnp.asarray(threshold, rms.dtype)
    return u / jnp.maximum(1.0, excess).astype(u.dtype)

"""Clipping of a leaf's update by its root mean square."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from came_optax._factoring import FactoredAxes
from came_optax._statistics import for_another_pass, mean_square


def clipped_by_leaf_rms(
    function: Callable[..., jax.Array],
    arguments: tuple[jax.Array, ...],
    axes: FactoredAxes,
    threshold: Any | None,
) -> jax.Array:
    """Returns an update divided by max(1, RMS / threshold), slice by slice if stacked.

    Args:
      function: what computes the leaf's update. For the root mean square it is called
        again, as computing the update twice takes less time than storing it.
      arguments: those of ``function``.
      axes: the leaf's axes; those of a stack hold independent parameters.
      threshold: the largest root mean square to let through; None clips nothing.
    """
    u = function(*arguments)
    if threshold is None or u.size == 0:
        return u
    again = function(*for_another_pass(arguments))
    shared = tuple(axis for axis in range(u.ndim) if axis not in axes.stack)
    rms = jnp.expand_dims(jnp.sqrt(mean_square(again, shared, 0.0)), shared)
    excess = rms / jnp.asarray(threshold, rms.dtype)
    return u / jnp.maximum(1.0, excess).astype(u.dtype)

"""Clipping of each leaf's update by its root mean square."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from came_optax._boxes import unboxed
from came_optax._factoring import FactoredAxes, FactoringRule, factored_axes
from came_optax._statistics import mean_square


def clip_by_leaf_rms(
    threshold: Any | None, factoring: FactoringRule
) -> optax.GradientTransformationExtraArgs:
    """Divides each leaf by max(1, RMS / threshold), slice by slice where stacked.

    As ``optax.clip_by_block_rms``, but aware of ``factoring``'s stack axes.

    Args:
      threshold: the largest root mean square to let through; None clips nothing.
      factoring: the rule whose stack axes hold independent parameters.
    """
    if threshold is None:
        return optax.with_extra_args_support(optax.identity())

    def clip(u: jax.Array, axes: FactoredAxes) -> jax.Array:
        if u.size == 0:
            return u
        shared = tuple(axis for axis in range(u.ndim) if axis not in axes.stack)
        rms = jnp.expand_dims(jnp.sqrt(mean_square(u, shared, 0.0)), shared)
        excess = rms / jnp.asarray(threshold, rms.dtype)
        return u / jnp.maximum(1.0, excess).astype(u.dtype)

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, Any]:
        del params, extra_args
        axes = factored_axes(factoring, updates)
        return jax.tree.map(clip, updates, axes), state

    return unboxed(
        optax.GradientTransformationExtraArgs(optax.init_empty_state, update_fn)
    )

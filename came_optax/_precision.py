"""Arithmetic in float32 or wider, whatever the dtype of gradients and parameters."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from came_optax._checks import check_inexact, check_params, check_state
from came_optax._statistics import real_dtype


def in_full_precision(
    inner: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
    """Runs a chain in float32 or wider, and rounds once, at its end.

    Not only for accuracy: a learning rate or weight decay that is a float32 array (as
    with ``optax.inject_hyperparams``) would promote narrower updates, and a large
    update in float16 be infinite before the learning rate makes it small.
    """

    def widen(x: jax.Array) -> jax.Array:
        x = jnp.asarray(x)  # NumPy's 64 bits become 32 without jax_enable_x64.
        return x if jnp.iscomplexobj(x) else x.astype(real_dtype(x.dtype))

    def narrow(x: jax.Array, like: Any) -> jax.Array:
        return x.astype(jax.dtypes.canonicalize_dtype(like.dtype))

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, Any]:
        check_state(state, tuple, "a chain")
        check_inexact("updates", updates)
        like = updates
        if params is not None:
            check_params(params, updates)
            like, params = params, jax.tree.map(widen, params)
        updates = jax.tree.map(widen, updates)
        updates, state = inner.update(updates, state, params, **extra_args)
        return jax.tree.map(narrow, updates, like), state

    return optax.GradientTransformationExtraArgs(inner.init, update_fn)

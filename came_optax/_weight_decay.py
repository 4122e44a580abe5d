"""Weight decay that doesn't round updates to the parameters' dtype."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from came_optax._boxes import unbox
from came_optax._checks import checked_mask


def add_decayed_weights(
    weight_decay: Any, mask: Any
) -> optax.GradientTransformationExtraArgs:
    """``optax.add_decayed_weights`` in the updates' dtype, with a mask that is checked.

    Raises:
      TypeError: the mask is a single bool.
    """
    if isinstance(mask, bool | np.bool_):
        raise TypeError(
            f"weight_decay_mask={mask} is no tree of bools (optax.inject_hyperparams "
            'calls a function, unless static_args="weight_decay_mask" names it)'
        )

    def masks(params: optax.Params) -> Any:
        return checked_mask("weight_decay_mask", mask, params)

    def init_fn(params: optax.Params) -> Any:
        if mask is not None and jax.tree.leaves(params):
            masks(params)
        return optax.EmptyState()

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **_: Any
    ) -> tuple[optax.Updates, Any]:
        if not isinstance(weight_decay, jax.Array) and weight_decay == 0:
            return updates, state
        if params is None:
            raise ValueError(
                f"weight_decay={weight_decay!r} needs the parameters: call "
                "update(grads, state, params); you are not passing `params`"
            )

        def decay(u: jax.Array, p: Any, decays: Any = True) -> jax.Array:
            return (
                u + jnp.asarray(weight_decay, u.dtype) * p.astype(u.dtype)
                if decays
                else u
            )

        given = () if mask is None else (masks(params),)
        return jax.tree.map(decay, updates, unbox(params), *given), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)

"""Parameters and state can be donated, so that an update needs no second copy."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

from came_optax import (
    BalancedSplit,
    came,
    scale_by_confidence,
    scale_by_factored_moment,
)

OPTIMIZERS: dict[str, optax.GradientTransformationExtraArgs] = {
    "came": came(1e-3),
    "came with options": came(
        optax.constant_schedule(1e-3),
        weight_decay=0.1,
        factoring=BalancedSplit(),
        mu_dtype="bfloat16",
        bias_correction=True,
        update_clipping_threshold=1.0,
    ),
    "int8": came(1e-3, mu_dtype="int8"),
    "int4": came(1e-3, mu_dtype="int4", factoring=BalancedSplit()),
    "injected": optax.inject_hyperparams(came)(1e-3),
    "scale_by_factored_moment": scale_by_factored_moment(),
    "scale_by_confidence": scale_by_confidence(),
}


def make_params() -> dict[str, jax.Array]:
    shapes = {"kernel": (2, 48, 46), "twin": (2, 48, 46), "bias": (46,), "scale": ()}
    return {name: jnp.ones(shape) for name, shape in shapes.items()}


def buffers(tree: Any) -> list[int]:
    return [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)]


@pytest.mark.slow(but=5)
@pytest.mark.parametrize("jitted", [True, False], ids=["jitted init", "eager init"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_params_and_state_are_donated_whole(name: str, jitted: bool) -> None:
    tx, params = OPTIMIZERS[name], make_params()
    state = (jax.jit(tx.init) if jitted else tx.init)(params)
    assert len(set(buffers((params, state)))) == len(buffers((params, state)))

    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    grads = make_params()
    step = jax.jit(step, donate_argnums=(0, 1))
    for _ in range(2):
        donated = params, state
        given = set(buffers(donated))
        params, state = step(params, state, grads)
        # Not merely deleted: the outputs live where the inputs were.
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(donated))
        assert set(buffers((params, state))) == given
        assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(grads))

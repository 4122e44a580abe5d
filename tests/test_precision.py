"""In which precision what is computed, and of which parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

from came_optax import came


def decayed(params, mask):
    """Returns which leaves an update without gradients makes smaller."""
    tx = came(0.1, weight_decay=0.5, weight_decay_mask=mask)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(tx.update)(zeros, tx.init(params), params)
    return jax.tree.map(lambda u: bool(jnp.any(u != 0)), updates)


def test_a_mask_by_dtype_sees_the_parameters_themselves():
    params = {"narrow": jnp.ones((6, 5), jnp.bfloat16), "wide": jnp.ones((6, 5))}
    seen = decayed(params, lambda p: jax.tree.map(lambda x: x.dtype == jnp.bfloat16, p))
    assert seen == {"narrow": True, "wide": False}


def test_a_mask_sees_boxes_as_they_are():
    def is_box(x):
        return isinstance(x, nn.Partitioned)

    boxed = nn.Partitioned(jnp.ones((6, 5)), ("a", None))
    seen = decayed(
        {"boxed": boxed, "bare": jnp.ones(5)},
        lambda params: jax.tree.map(is_box, params, is_leaf=is_box),
    )
    assert (seen["boxed"].value, seen["bare"]) == (True, False)
    state = nnx.state(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), nnx.Param)
    by_rank = decayed(state, lambda s: jax.tree.map(lambda p: p.ndim > 1, s))
    assert nnx.to_pure_dict(by_rank) == {"kernel": True, "bias": False}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_weight_decay_is_rounded_once(dtype):
    params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(6, 5)), dtype)}
    tx = came(0.1, weight_decay=0.3)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(tx.update)(zeros, tx.init(params), params)
    exact = jnp.float32(-0.1) * (jnp.float32(0.3) * params["w"].astype(jnp.float32))
    np.testing.assert_array_equal(updates["w"], exact.astype(dtype))


def test_schedule_free_takes_came_without_momentum():
    """It brings a momentum of its own; and steps would be of 10⁹ learning rates."""
    target = jnp.asarray(np.random.default_rng(0).normal(size=(6, 5)), jnp.float32)
    tx = optax.contrib.schedule_free(came(0.05, b1=0.0), 0.05, b1=0.9)
    params = jnp.zeros((6, 5))

    @jax.jit
    def step(params, state):
        updates, state = tx.update(2 * (params - target), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(300):
            params, state = step(params, state)
        found = optax.contrib.schedule_free_eval_params(state, params)
    np.testing.assert_allclose(found, target, atol=0.05)

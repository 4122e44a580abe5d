"""quantized_ema is optax.ema, stored in fewer bits."""

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

from came_optax import (
    Codes,
    quantized_ema,
)
from tests.draws import normal


def ema_gradients(step):
    return {"kernel": normal((64, 96), seed=step), "bias": normal((96,), seed=step)}


def average(tx, steps):
    state, update = tx.init(ema_gradients(0)), jax.jit(tx.update)
    with jax.numpy_dtype_promotion("standard"):  # optax.ema needs it.
        for step in range(steps):
            updates, state = update(ema_gradients(step), state)
    return updates, state


@pytest.mark.parametrize("debias", [False, True])
def test_in_float32_quantized_ema_is_optax_ema(debias):
    ours, _ = average(quantized_ema(0.9, debias=debias, mu_dtype="float32"), 5)
    expected, _ = average(optax.ema(0.9, debias=debias), 5)
    chex.assert_trees_all_close(ours, expected, rtol=1e-5, atol=1e-7)


def test_nesterov_looks_one_step_ahead():
    ours, state = average(quantized_ema(0.9, nesterov=True, mu_dtype=None), 5)
    expected = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, state.mu, ema_gradients(4))
    chex.assert_trees_all_close(ours, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("mu_dtype", "error"), [("int8", 0.02), ("int4", 0.3)])
def test_quantized_ema_is_near_in_codes(mu_dtype, error):
    ours, state = average(quantized_ema(0.9, mu_dtype=mu_dtype), 30)
    expected, _ = average(optax.ema(0.9, debias=False), 30)
    assert isinstance(state.mu["kernel"], Codes)
    assert not isinstance(state.mu["bias"], Codes)  # Too small to gain by them.
    difference = jnp.std(ours["kernel"] - expected["kernel"])
    assert 0 < difference < error * jnp.std(expected["kernel"])
    chex.assert_trees_all_close(ours["bias"], expected["bias"], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"decay": 1.0}, "^decay must be"), ({"decay": 0.9, "mu_dtype": "int9"}, "int9")],
)
def test_bad_arguments_of_quantized_ema_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        quantized_ema(**options)

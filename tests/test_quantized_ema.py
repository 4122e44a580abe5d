"""Momentum in 8 or 4 bits for any chain."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from came_optax import Codes, quantized_ema


def gradients(step: int) -> dict[str, jax.Array]:
    rng = np.random.default_rng(step)
    shapes = {"kernel": (64, 96), "bias": (96,)}
    return {n: jnp.asarray(rng.normal(size=s), jnp.float32) for n, s in shapes.items()}


def after(tx: Any, steps: int) -> Any:
    state, update = tx.init(gradients(0)), jax.jit(tx.update)
    for step in range(steps):
        updates, state = update(gradients(step), state)
    return updates, state


@pytest.mark.parametrize("debias", [False, True])
def test_in_float32_it_is_optax_ema(debias: bool) -> None:
    ours, _ = after(quantized_ema(0.9, debias=debias, mu_dtype="float32"), 5)
    with jax.numpy_dtype_promotion("standard"):  # optax.ema needs it.
        expected, _ = after(optax.ema(0.9, debias=debias), 5)
    chex.assert_trees_all_close(ours, expected, rtol=1e-5, atol=1e-7)


def test_nesterov_looks_one_step_ahead() -> None:
    ours, state = after(quantized_ema(0.9, nesterov=True, mu_dtype=None), 5)
    expected = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, state.mu, gradients(4))
    chex.assert_trees_all_close(ours, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("mu_dtype", "error"), [("int8", 0.02), ("int4", 0.3)])
def test_codes_are_near(mu_dtype: str, error: float) -> None:
    ours, state = after(quantized_ema(0.9, mu_dtype=mu_dtype), 30)
    expected, _ = after(optax.ema(0.9, debias=False), 30)
    assert isinstance(state.mu["kernel"], Codes)
    assert not isinstance(state.mu["bias"], Codes)  # Too small to gain by them.
    difference = jnp.std(ours["kernel"] - expected["kernel"])
    assert 0 < difference < error * jnp.std(expected["kernel"])
    chex.assert_trees_all_close(ours["bias"], expected["bias"], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"decay": 1.0}, "^decay must be"), ({"decay": 0.9, "mu_dtype": "int9"}, "int9")],
)
def test_bad_arguments_are_named(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantized_ema(**options)

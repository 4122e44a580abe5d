"""Nothing is a NaN or infinite on the way: JAX's checks stay silent, jitted or not."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from came_optax import (
    Stacked,
    came,
    quantized_ema,
    steady_came,
    with_master_weights,
)

OPTIMIZERS = {
    "came": came(1e-3),
    "steady_came": steady_came(1e-3, weight_decay=0.1),
    "without momentum": steady_came(1e-3, b1=0.0),
    "no decay at all": came(1e-3, b1=0.0, b2=0.0, b3=0.0, bias_correction=True),
    "bfloat16": came(1e-3, mu_dtype="bfloat16", factoring=Stacked(where="kernel")),
    "int8": steady_came(1e-3, mu_dtype="int8"),
    "int4": came(1e-3, mu_dtype="int4"),
    "quantized_ema": quantized_ema(0.9, debias=True, nesterov=True),
}


@pytest.fixture(params=["jitted", "not jitted"])
def debugging(request: pytest.FixtureRequest) -> Iterator[None]:
    with (
        jax.debug_nans(True),
        jax.debug_infs(True),
        jax.disable_jit(request.param == "not jitted"),
    ):
        yield


def gradients(step: int) -> dict[str, jax.Array]:
    rng = np.random.default_rng(step)
    g = {name: rng.normal(size=s) for name, s in {"kernel": (64, 66), "b": 9}.items()}
    g["kernel"][3], g["kernel"][:, 5] = 0, 0  # A row and a column that never have any.
    g["zeros"], g["scalar"], g["empty"] = (
        np.zeros((6, 5)),
        np.ones(()),
        np.zeros((0, 3)),
    )
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), g)


@pytest.mark.slow(but=1)
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.usefixtures("debugging")
def test_updates(name: str) -> None:
    tx, params = OPTIMIZERS[name], gradients(0)
    state, update = tx.init(params), jax.jit(tx.update)
    for step in range(3):
        _, state = update(gradients(step), state, params)


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.usefixtures("debugging")
def test_weights(bits: int, dtype: Any) -> None:
    largest = float(jnp.finfo(dtype).max)
    params = jnp.array([0.0, -0.0, 1.0, -3.3, 1e-40, largest, -largest], dtype)
    tx = with_master_weights(optax.sgd(1.0), bits)
    for grads in (jnp.zeros_like(params), jnp.full_like(params, 1e-3)):
        updates, _ = tx.update(grads, tx.init(params), params)
        assert jnp.isfinite(updates).all()


def test_the_checks_would_find_some() -> None:
    with jax.debug_nans(True), pytest.raises(FloatingPointError, match="nan"):
        jnp.zeros(2) / jnp.zeros(2)
    with jax.debug_infs(True), pytest.raises(FloatingPointError, match="inf"):
        jnp.ones(2) / jnp.zeros(2)

"""A running job goes on with came_muon, and back."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from came_optax import (
    came_muon,
    convert_state,
)
from tests.draws import normal_tree

TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 64, (40, 64)))


def trained(tx, params, state, steps):
    """Parameters, state and losses after steps on other tokens each."""

    def loss_fn(params, tokens):
        x = params["embed"][tokens]
        x = x + jax.nn.relu(x @ params["up"]["kernel"]) @ params["down"]["kernel"]
        labels = 3 * tokens % 64
        logits = x @ params["head"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def step(params, state, tokens):
        loss, grads = jax.value_and_grad(loss_fn)(params, tokens)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    losses = []
    for i in steps:
        params, state, loss = step(params, state, TOKENS[i])
        losses.append(float(loss))
    return params, state, losses


MUON = optax.contrib.muon(
    1e-2,
    consistent_rms=0.2,
    muon_weight_dimension_numbers=lambda params: {
        name: optax.contrib.MuonDimensionNumbers() if name in ("up", "down") else None
        for name in params
    },
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new"),
    [
        (optax.adamw(1e-2), came_muon(1e-2)),
        (MUON, came_muon(1e-2)),
        (came_muon(1e-2, mu_dtype="float32"), came_muon(1e-2, mu_dtype="int8")),
        (came_muon(1e-2, mu_dtype="int8"), came_muon(1e-2, mu_dtype="int4")),
        (came_muon(1e-2), optax.adamw(1e-2)),
    ],
    ids=["AdamW", "Muon", "int8", "int4", "to AdamW"],
)
def test_a_running_job_goes_on_with_another_state(old, new):
    shapes = {"embed": (64, 64), "up/kernel": (64, 72), "down/kernel": (72, 64)}
    params = jax.tree.map(lambda p: 0.1 * p, normal_tree({**shapes, "head": (64, 64)}))
    with jax.numpy_dtype_promotion("standard"):
        params, state, before = trained(old, params, old.init(params), range(20))
        convert = jax.jit(functools.partial(convert_state, old=old, new=new))
        state = convert(state, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(state, new.init(params))
        _, _, after = trained(new, params, state, range(20, 40))
    assert np.mean(before[-3:]) < 0.8 * before[0]  # It was learning,
    assert max(after) < 1.05 * np.mean(before[-3:])  # does not fall back
    assert after[-1] < 0.8 * after[0]  # and goes on.


def test_converted_momentum_has_muons_direction():
    """Of a matrix as the rule reads it: an attention kernel's of three axes, too."""
    params = normal_tree({"up": (64, 72), "query": (64, 4, 16), "b": (64,)})
    params["query"] *= jnp.where(jnp.arange(64) % 2, 1.0, 100.0)[:, None, None]
    numbers = {
        "up": optax.contrib.MuonDimensionNumbers(),
        "query": optax.contrib.MuonDimensionNumbers(0, (1, 2)),
        "b": None,
    }
    old = optax.contrib.muon(1e-2, muon_weight_dimension_numbers=numbers)
    new = came_muon(1e-2, mu_dtype=None)
    with jax.numpy_dtype_promotion("standard"):
        state = jax.jit(old.update)(params, old.init(params), params)[1]
        converted = convert_state(state, params, old=old, new=new)
    for name in ("up", "query"):
        mu = optax.tree.get(state.inner_states["muon"], "mu")[name]
        converted_mu = optax.tree.get(converted.inner_states["hidden"], "mu")[name]
        expected = mu / jnp.sqrt(39 * jnp.mean(mu**2))
        chex.assert_trees_all_close(converted_mu, expected, rtol=1e-5)

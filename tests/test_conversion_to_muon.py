"""A running job goes on with came_muon, and back."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from came_optax import (
    BalancedSplit,
    came_muon,
    conversion_report,
    convert_state,
    steady_came,
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


NUMBERS = {
    "up": optax.contrib.MuonDimensionNumbers(),
    "query": optax.contrib.MuonDimensionNumbers(0, (1, 2)),
    "b": None,
}


MUON_OF_NUMBERS = optax.contrib.muon(1e-2, muon_weight_dimension_numbers=NUMBERS)
PARAMS = normal_tree({"up": (64, 72), "query": (64, 4, 16), "b": (64,)})
PARAMS["query"] *= jnp.where(jnp.arange(64) % 2, 1.0, 100.0)[:, None, None]
HIDDEN = ("up", "query")


def moved(*optimizers):
    """The states of optimizers: the first after a step, the others from the one before.

    Its gradients are the parameters.
    """
    with jax.numpy_dtype_promotion("standard"):
        first = optimizers[0]
        states = [jax.jit(first.update)(PARAMS, first.init(PARAMS), PARAMS)[1]]
        for old, new in itertools.pairwise(optimizers):
            convert = functools.partial(convert_state, old=old, new=new)
            states.append(jax.jit(convert)(states[-1], PARAMS))
    return states


def hidden_state(state):
    return optax.tree.get(state.inner_states["hidden"], "CameMuonState")


def momentum(state):
    """That of hidden matrices, in whatever part of the state it is."""
    parts = getattr(state, "inner_states", {})
    part = parts.get("hidden", parts.get("muon", state))
    mu = optax.tree.get(part, "mu")
    return {name: mu[name] for name in HIDDEN}


@pytest.mark.slow(but=1)
@pytest.mark.parametrize("old", [MUON_OF_NUMBERS, optax.adamw(1e-2)])
def test_momentum_of_gradients_goes_there_and_back_as_it_is(old):
    """Gradients this large, Adam's over their root mean square would be clipped."""
    states = moved(old, came_muon(1e-2, mu_dtype=None), MUON_OF_NUMBERS)
    for state in states[1:]:
        chex.assert_trees_all_equal(momentum(state), momentum(states[0]))
    is_muon = old is MUON_OF_NUMBERS
    assert hidden_state(states[1]).count == (1 if is_muon else 10**7)
    coefficients = optax.tree.get(states[-1], "ns_coeffs")
    expected = optax.tree.get(MUON_OF_NUMBERS.init(PARAMS), "ns_coeffs")
    chex.assert_trees_all_equal(coefficients, expected)
    report = conversion_report(PARAMS, old=old, new=MUON_OF_NUMBERS)
    assert not (report.anew or report.dropped)
    assert is_muon == ("MuonState at" in " ".join(report.kept))


def test_momentum_of_came_is_given_its_second_moment():
    rule = BalancedSplit(min_dim_size=2)
    old = steady_came(1e-2, factoring=rule)
    state, converted = moved(old, came_muon(1e-2, mu_dtype=None, factoring=rule))
    came = optax.tree.get(state, "ScaleByCameState")
    row, col = came.v_row["up"], came.v_col["up"]
    expected = came.mu["up"] * jnp.sqrt(jnp.outer(row, col) / jnp.mean(row))
    chex.assert_trees_all_close(momentum(converted)["up"], expected, rtol=1e-5)
    assert not hidden_state(converted).v_row["up"].any()


@pytest.mark.slow(but=1)
@pytest.mark.parametrize("old", [MUON_OF_NUMBERS, came_muon(1e-2, mu_dtype=None)])
@pytest.mark.parametrize("new", ["came", "adam"])
def test_momentum_of_gradients_is_over_one_root_mean_square_a_matrix(old, new):
    """Of a matrix as the rule reads it: an attention kernel's of three axes, too."""
    came = steady_came(1e-2, factoring=BalancedSplit(min_dim_size=2))
    state, converted = moved(old, came if new == "came" else optax.adam(1e-2))
    mu, converted_mu = momentum(state), momentum(converted)
    for name in HIDDEN:
        square = 39 * jnp.mean(mu[name] ** 2)
        if new == "came":
            expected = mu[name] / jnp.sqrt(square)
        else:
            expected = mu[name]
            nu = optax.tree.get(converted, "nu")[name]
            by_muon = old is MUON_OF_NUMBERS and name == "query"
            if not by_muon:  # Of which neither knows which axes are its matrix.
                chex.assert_trees_all_close(nu, jnp.full_like(nu, square), rtol=1e-5)
        chex.assert_trees_all_close(converted_mu[name], expected, rtol=1e-5)


def test_another_dtype_keeps_statistics_and_count():
    old = came_muon(1e-2)
    state, converted = map(hidden_state, moved(old, came_muon(1e-2, mu_dtype="int4")))
    chex.assert_trees_all_equal(state._replace(mu=None), converted._replace(mu=None))
    assert converted.mu["up"].bits == 4

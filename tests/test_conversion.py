"""A running job goes on under another optimizer, momentum dtype, rule or mesh."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from came_optax import (
    BalancedSplit,
    LargestTwoAxes,
    LastTwoAxes,
    Stacked,
    came,
    convert_state,
    quantized_ema,
    scale_by_confidence,
    scale_by_factored_moment,
    steady_came,
)

pytestmark = pytest.mark.usefixtures("promotion")
SCHEDULE = optax.linear_schedule(0.0, 1e-2, 100)
SHAPES = {"bias": (96,), "kernel": (80, 96), "query": (4, 32, 4, 16), "long": (5000,)}


def make_params(dtype="float32"):
    keys = jax.random.split(jax.random.key(0), len(SHAPES))
    return {
        name: jax.random.normal(key, shape, dtype)
        for key, (name, shape) in zip(keys, SHAPES.items(), strict=True)
    }


@jax.jit
def gradients(params, step):
    """Noise, and a part that stays the same."""
    key = jax.random.fold_in(jax.random.key(1), step)
    return jax.tree.map(
        lambda p: (0.5 * p + jax.random.normal(key, p.shape)).astype(p.dtype), params
    )


@functools.cache
def steady(mu_dtype, **kwargs):
    return steady_came(SCHEDULE, mu_dtype=mu_dtype, **kwargs)


compiled = functools.cache(jax.jit)  # Once for each optimizer.


def train(tx, state, params, steps):
    update = compiled(tx.update)
    for step in steps:
        updates, state = update(gradients(params, step), state, params)
    return updates, state


def convert(state, params, old, new):
    return jax.jit(lambda s, p: convert_state(s, p, old=old, new=new))(state, params)


def cosine(x, y):
    return float(jnp.vdot(x, y) / jnp.linalg.norm(x) / jnp.linalg.norm(y))


def check_alike(updates, expected, least, rtol):
    """Asserts that updates go the same way, and as far."""
    for name, x in expected.items():
        assert cosine(updates[name], x) > least, name
        norms = jnp.linalg.norm(updates[name]), jnp.linalg.norm(x)
        np.testing.assert_allclose(*norms, rtol=rtol, err_msg=name)


@pytest.mark.slow(but=1)
@pytest.mark.parametrize(
    ("mu_dtype", "new_dtype"),
    [
        ("float32", "int8"),
        ("float32", "bfloat16"),
        ("bfloat16", "int4"),
        ("int8", "float32"),
        ("int8", "int4"),
        ("int4", "bfloat16"),
    ],
)
def test_momentum_in_other_dtypes(mu_dtype, new_dtype):
    params, old, new = make_params(), steady(mu_dtype), steady(new_dtype)
    _, state = train(old, old.init(params), params, range(5))
    converted = convert(state, params, old, new)
    chex.assert_trees_all_equal_shapes_and_dtypes(converted, new.init(params))
    assert (converted[0].count, converted[-1].count) == (5, 5)
    chex.assert_trees_all_equal(converted[0]._replace(mu=0), state[0]._replace(mu=0))
    expected, _ = train(old, state, params, range(5, 6))
    updates, _ = train(new, converted, params, range(5, 6))
    least = 0.98 if "int4" in (mu_dtype, new_dtype) else 0.999
    for name in params:
        assert cosine(updates[name], expected[name]) > least, name


LAST, BALANCED, STACKED = RULES = [
    LastTwoAxes(),
    BalancedSplit(),
    Stacked(BalancedSplit(), where="query"),
]


@functools.cache
def after_50_steps(rule, mu_dtype):
    params = make_params()
    tx = steady(mu_dtype, factoring=rule)
    return train(tx, tx.init(params), params, range(50))[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "new_rule", "mu_dtype"),
    [
        (LAST, BALANCED, "float32"),
        (BALANCED, LAST, "float32"),
        (LAST, STACKED, "int8"),
        (STACKED, BALANCED, "int4"),
        (BALANCED, STACKED, "int4"),
    ],
)
def test_other_rules(rule, new_rule, mu_dtype):
    params = make_params()
    old, new = (steady(mu_dtype, factoring=r) for r in (rule, new_rule))
    state, from_start = (after_50_steps(r, mu_dtype) for r in (rule, new_rule))
    converted = convert(state, params, old, new)
    assert jax.tree.map(jnp.shape, converted) == jax.tree.map(jnp.shape, from_start)
    for name in ("v_row", "v_col", "v", "s_row", "s_col"):
        for leaf in params:
            x, y = (getattr(s[0], name)[leaf] for s in (converted, from_start))
            np.testing.assert_allclose(x.mean(), y.mean(), rtol=0.05)
            assert jnp.median(jnp.abs(x - y)) <= 0.2 * y.mean(), (name, leaf)
    expected, _ = train(new, from_start, params, range(50, 51))
    updates, _ = train(new, converted, params, range(50, 51))
    check_alike(updates, expected, 0.95, 0.05)


@pytest.mark.slow(but=1)
@pytest.mark.parametrize("rule", RULES)
def test_statistics_of_a_product_stay_what_they_are(rule):
    """Where |g|² is of rank 1 whichever matrix is read, nothing is lost."""
    params = {"query": jnp.ones((4, 8, 4, 16))}
    g = jax.tree.map(
        lambda x, i: x * i, params, {"query": jnp.arange(1.0, 17)[None, None, None]}
    )
    old, new = (came(1e-3, factoring=r) for r in (LastTwoAxes(), rule))
    _, state = old.update(g, old.init(params), params)
    _, expected = new.update(g, new.init(params), params)
    converted = convert_state(state, params, old=old, new=new)
    for name in ("v_row", "v_col", "s_row", "s_col"):
        x, y = (getattr(s[0], name)["query"] for s in (converted, expected))
        np.testing.assert_allclose(x, y, rtol=1e-5)


@pytest.mark.slow
def test_a_leaf_that_becomes_a_matrix_has_the_others_instability():
    params = make_params()
    small = steady_came(SCHEDULE, factoring=LargestTwoAxes(64))  # Not the query.
    new = steady("float32")
    _, state = train(small, small.init(params), params, range(50))
    assert state[0].s_row["query"].shape == (1,)
    converted = convert_state(state, params, old=small, new=new)
    rows = state[0].s_row["kernel"].mean()
    np.testing.assert_allclose(converted[0].s_row["query"], rows, rtol=1e-5)
    expected, _ = train(small, state, params, range(50, 51))
    updates, _ = train(new, converted, params, range(50, 51))
    ratio = jnp.linalg.norm(updates["query"]) / jnp.linalg.norm(expected["query"])
    assert 0.5 < ratio < 1.5
    back = convert_state(converted, params, old=new, new=small)
    np.testing.assert_allclose(
        back[0].v["query"].mean(), state[0].v["query"].mean(), rtol=1e-5
    )


ADAMS = {
    "adamw": lambda: optax.adamw(SCHEDULE, b2=0.95),
    "bfloat16": lambda: optax.adamw(SCHEDULE, b2=0.95, mu_dtype="bfloat16"),
    "chain": lambda: optax.chain(
        optax.clip_by_global_norm(1.0), optax.nadamw(SCHEDULE, b2=0.95)
    ),
    "injected": lambda: optax.inject_hyperparams(optax.adamw)(SCHEDULE, b2=0.95),
}


@pytest.mark.slow(but=1)
@pytest.mark.parametrize(
    ("adam", "mu_dtype", "rule"),
    [
        *((adam, "int8", LAST) for adam in ADAMS),
        ("adamw", "float32", BALANCED),
        ("adamw", "int4", STACKED),
    ],
)
def test_adam(adam, mu_dtype, rule):
    """After it has averaged for long enough, CAME goes where Adam would have gone."""
    params, old, new = make_params(), ADAMS[adam](), steady(mu_dtype, factoring=rule)
    _, state = train(old, old.init(params), params, range(100))
    converted = convert(state, params, old, new)
    assert (converted[0].count, converted[-1].count) == (10**7, 100)
    expected, _ = train(old, state, params, range(100, 101))
    updates, _ = train(new, converted, params, range(100, 101))
    check_alike(updates, expected, 0.95, 0.3)


def test_back_to_adam():
    """The rows and columns of |g|² of rank 1 are all of it."""
    params = {"kernel": jnp.ones((8, 4)), "bias": jnp.ones(4)}
    adamw, new = optax.adamw(SCHEDULE, mu_dtype="bfloat16"), came(SCHEDULE)
    state = adamw.init(params)
    for _ in range(5):
        _, state = adamw.update(params, state, params)
    there = convert(state, params, adamw, new)
    back = convert(there, params, new, adamw)
    assert (back[0].count, back[-1].count) == (10**7, 5)
    assert back[0].mu["kernel"].dtype == jnp.bfloat16
    for name, nu in state[0].nu.items():
        np.testing.assert_allclose(back[0].nu[name], nu, rtol=1e-6)
        mu = back[0].mu[name].astype("float32")  # Its RMS was more than 1.
        np.testing.assert_allclose(mu, jnp.sqrt(nu), rtol=1e-2)


EMA = optax.ema(0.9, debias=False)


@pytest.mark.slow(but=1)
@pytest.mark.parametrize(
    ("old", "new"),
    [
        (quantized_ema(0.9, mu_dtype="float32"), quantized_ema(0.9, mu_dtype="int8")),
        (quantized_ema(0.9, mu_dtype="int4"), quantized_ema(0.9, mu_dtype="bfloat16")),
        (EMA, quantized_ema(0.9, mu_dtype="int8")),
        (quantized_ema(0.9, mu_dtype="int8"), EMA),
        (
            scale_by_confidence(eps2=0.1, mu_dtype="int8"),
            scale_by_confidence(eps2=0.1, factoring=BalancedSplit()),
        ),
        (
            scale_by_factored_moment(),
            scale_by_factored_moment(factoring=LargestTwoAxes(64)),
        ),
    ],
    ids=["int8", "bfloat16", "from ema", "to ema", "confidence", "factored moment"],
)
def test_averages_and_halves(old, new):
    """After one more step they are where they would have been."""
    params = {name: p for name, p in make_params().items() if name != "long"}
    state = old.init(params)
    for _ in range(3):
        _, state = old.update(params, state, params)
    converted = convert_state(state, params, old=old, new=new)
    chex.assert_trees_all_equal_shapes_and_dtypes(converted, new.init(params))
    expected, state = old.update(params, state, params)
    updates, converted = new.update(params, converted, params)
    assert converted.count == state.count == 4
    check_alike(updates, expected, 0.9, 0.1)


@pytest.mark.parametrize(
    "old",
    [
        optax.adamw(1e-3),
        came(1e-3, mu_dtype="int8"),
        came(1e-3, mu_dtype="bfloat16"),
        came(1e-3, factoring=BalancedSplit()),
    ],
    ids=["adamw", "int8", "bfloat16", "rule"],
)
def test_refused_states_name_what_to_do(old):
    params = make_params()
    for tx in (came(1e-3), came(1e-3, mu_dtype="int8", factoring=Stacked())):
        with pytest.raises((TypeError, ValueError), match="convert_state"):
            tx.update(params, old.init(params), params)


@pytest.mark.parametrize(
    ("made_by", "message"),
    [
        (came(1e-3), r"at '0': ScaleByCameState\(.*4 more\) and .*; it is one of new"),
        (optax.adam(1e-3), r"they differ: tuple\('0', '1'\) and tuple\('0', .* '2'\)$"),
    ],
    ids=["swapped", "another"],
)
def test_a_state_of_another_optimizer_than_old(made_by, message):
    params = make_params()
    with pytest.raises(ValueError, match=f"state is not one of old.*{message}"):
        convert_state(
            made_by.init(params), params, old=optax.adamw(1e-3), new=came(1e-3)
        )


def test_a_resized_parameter_is_named_as_such():
    """Whether on an update or on converting, which can't help."""
    small, large = {"embed": jnp.ones((96, 8))}, {"embed": jnp.ones((128, 8))}
    tx, message = came(1e-3), r"embed' has shape .*the parameter was resized"
    state = tx.init(small)
    with pytest.raises(ValueError, match=message):
        tx.update(large, state, large)
    with pytest.raises(ValueError, match=message):
        convert_state(state, large, old=tx, new=came(1e-3, mu_dtype="int8"))

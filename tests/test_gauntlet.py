"""Inputs that break optimizers: everything stays finite, and below a stated bound.

Bounds are on the largest element of any update, in units of the learning rate, seen
over 400 steps on a (4, 6) leaf. The first of a pair is the published algorithm's; the
second that of its options to bound it, where √24 is the largest element of 24 whose
root mean square is 1. Where the first is large, the algorithm is so, not its rounding.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from came_optax import (
    Stacked,
    came,
    came_muon,
    quantized_ema,
    scale_by_came,
    steady_came,
    with_master_weights,
)

STEPS, SHAPE = 400, (4, 6)
EXAMPLES = settings.default.max_examples  # 25, unless --hypothesis-profile says so.
VARIANTS = {
    "published": scale_by_came(),
    "bounded": scale_by_came(bias_correction=True, update_clipping_threshold=1.0),
    "unclipped": scale_by_came(clipping_threshold=None),
    "came_muon": came_muon(1.0, hidden="matrix", mu_dtype=None),
}


def noise(steps=STEPS):
    return np.random.default_rng(0).normal(size=(steps, *SHAPE))


def lone_spike(others_at_the_end):
    """Row 0 and column 0 see no gradient but 1e9 where they cross, at the last step."""
    g = noise()
    g[:, 0], g[:, :, 0] = 0.0, 0.0
    g[-1] *= others_at_the_end
    g[-1, 0, 0] = 1e9
    return g


steps = np.arange(STEPS)[:, None, None]
signs = (-1.0) ** steps
ones = np.ones((STEPS, *SHAPE))
magnitudes = 10.0 ** np.random.default_rng(1).integers(-45, 31, (STEPS, *SHAPE))
row_0_at_the_end = (steps == STEPS - 1) | (np.arange(4)[:, None] > 0)
ROOT_24 = 24**0.5
GAUNTLET = {
    "zeros for ever": (0 * ones, 0.0, 0.0),
    "zeros, then noise": (np.where(steps < 200, 0.0, noise()), 30.0, ROOT_24),
    "noise, then zeros": (np.where(steps < 200, noise(), 0.0), 30.0, ROOT_24),
    "zero row meets zero column": (lone_spike(0.0), 226.0, ROOT_24),
    "zero row meets zero column amid noise": (lone_spike(1.0), 6.1e8, ROOT_24),
    "a row of zeros, then one hit": (noise() * row_0_at_the_end, 30.0, ROOT_24),
    "alternating signs": (signs * ones, 11.2, 1.01),
    "alternating noise": (signs * noise()[:1], 30.0, ROOT_24),
    "denormal": (1e-40 * noise(), 1e-3, 1e-3),
    "1e-30": (1e-30 * noise(), 1e-3, 1e-3),
    "1e30": (1e30 * noise(), 40.0, ROOT_24),
    "one step of 1e30": (np.where(steps == 200, 1e30, 1.0) * noise(), 30.0, ROOT_24),
    "1e-30 rising to 1e30": (10 ** (steps / 400 * 60 - 30) * noise(), 40.0, ROOT_24),
    "1e30 falling to 1e-30": (10 ** (30 - steps / 400 * 60) * noise(), 40.0, ROOT_24),
    "all magnitudes at once": (magnitudes * noise(), 6.1e8, ROOT_24),
    "all equal": (ones, 50.0, 1.01),
    "heavy tails": (np.random.default_rng(0).standard_cauchy(ones.shape), 28, ROOT_24),
}


@functools.partial(jax.jit, static_argnames="tx")
def run(grads, tx):
    """Returns the largest element of each step's updates, and the last state."""

    def step(state, g):
        updates, state = tx.update(g, state)
        return state, jax.tree.map(lambda u: jnp.max(jnp.abs(u)), updates)

    state = tx.init(jax.tree.map(lambda g: g[0], grads))
    state, largest = jax.lax.scan(step, state, grads)
    return largest, state


@pytest.mark.parametrize("variant", ["published", "bounded"])
@pytest.mark.parametrize("name", GAUNTLET)
def test_bounded(name, variant):
    grads, published, bounded = GAUNTLET[name]
    g = jnp.asarray(grads, jnp.float32)
    # A vector's update is the momentum of what the RMS clip lets through.
    tree = {"matrix": g, "vector": g.reshape(STEPS, -1)}
    largest, state = run(tree, VARIANTS[variant])
    assert jax.tree.map(jnp.shape, state.v_row) == {"matrix": (4,), "vector": (1,)}
    chex.assert_tree_all_finite((largest, state))
    bound = published if variant == "published" else bounded
    assert jnp.max(largest["matrix"]) <= bound * 1.0001
    assert jnp.max(largest["vector"]) <= ROOT_24 * 1.0001


@given(
    data=st.lists(
        st.lists(st.integers(-46, 30), min_size=12, max_size=12), min_size=4, max_size=4
    ),
    variant=st.sampled_from(list(VARIANTS)),
)
@settings(max_examples=4 * EXAMPLES)
def test_finite_for_gradients_from_0_to_1e30(data, variant):
    exponents = np.reshape(data, (4, 3, 4))
    values = np.where(exponents == -46, 0.0, 10.0**exponents) * noise(4)[:, :3, :4]
    grads = jnp.asarray(values, jnp.float32)
    tree = {"matrix": grads, "vector": grads.reshape(4, 12)}
    chex.assert_tree_all_finite(run(tree, VARIANTS[variant]))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_bad_gradients_show_in_the_update(bad):
    tx = came(1e-3)
    good = {"kernel": jnp.ones(SHAPE), "other": jnp.ones(SHAPE)}
    grads = good | {"kernel": good["kernel"].at[1, 2].set(bad)}
    updates, _ = jax.jit(tx.update)(grads, tx.init(good))
    assert not jnp.isfinite(updates["kernel"][1, 2])
    chex.assert_tree_all_finite(updates["other"])


@pytest.mark.parametrize("guard", ["apply_if_finite", "zero_nans"])
def test_one_nan_step_is_survived(guard):
    guarded = {
        "apply_if_finite": optax.apply_if_finite(came(1.0), max_consecutive_errors=1),
        "zero_nans": optax.chain(optax.zero_nans(), came(1.0)),
    }[guard]
    grads = jnp.asarray(noise(20), jnp.float32).at[10, 1].set(jnp.nan)
    largest, state = run(grads, guarded)
    chex.assert_tree_all_finite((largest, optax.tree.get(state, "mu")))
    assert jnp.max(largest) <= 30.0
    if guard == "apply_if_finite":
        without, plain_state = run(jnp.delete(grads, 10, axis=0), came(1.0))
        chex.assert_trees_all_close(jnp.delete(largest, 10), without, rtol=1e-5)
        chex.assert_trees_all_close(state.inner_state, plain_state, rtol=1e-5)


@pytest.mark.slow(but=3)
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("scale", [1e-7, 1.0, 6e4])
def test_sixteen_bits_from_the_first_step(dtype, scale):
    # float16 holds 6e-8 to 65504, and a square of neither end.
    grads = jnp.asarray(np.clip(scale * noise(50), -65504, 65504), dtype)
    largest, state = run({"matrix": grads, "vector": grads.reshape(50, -1)}, came(1.0))
    chex.assert_tree_all_finite((largest, state))
    assert largest["matrix"].dtype == dtype
    assert jnp.max(largest["matrix"]) <= 60
    assert jnp.max(largest["vector"]) <= ROOT_24


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "bound"),
    [
        ("noise", 2e-5),
        # The average stops where a step toward its goal is below half its last bit:
        # 6e-8 / (1 − β2) of it for v.
        ("constant", 6e-5),
    ],
)
def test_no_drift_in_100_000_steps(kind, bound):
    """Statistics against the same run in float64, relative."""
    # Numbers that float32 holds, as both runs have to have the same.
    b1, b2, b3 = (float(np.float32(b)) for b in (0.9, 0.999, 0.9999))
    tx = scale_by_came(b1, b2, b3=b3)

    def step(state, t):
        g = jnp.ones(SHAPE, jnp.float32)
        if kind == "noise":
            key = jax.random.fold_in(jax.random.key(0), t)
            g = jax.random.normal(key, SHAPE, jnp.float32)
        g = g.astype(state.mu["matrix"].dtype)
        return tx.update({"matrix": g, "vector": g.reshape(-1)}, state)[1], None

    @jax.jit
    def scan(params):
        steps = jnp.arange(100_000, dtype=jnp.int32)
        return jax.lax.scan(step, tx.init(params), steps)[0]

    with jax.enable_x64(True):
        zeros = jnp.zeros(SHAPE, jnp.float32)
        params = {"matrix": zeros, "vector": zeros.reshape(-1)}
        state, expected = scan(params), scan(optax.tree.cast(params, jnp.float64))
        for name in ("v_row", "v_col", "v", "s_row", "s_col"):
            found = optax.tree.cast(getattr(state, name), jnp.float64)
            chex.assert_trees_all_close(found, getattr(expected, name), rtol=bound)


# Nothing is a NaN or infinite on the way: JAX's checks stay silent, jitted or not.
CHECKED = {
    "came": came(1e-3),
    "steady_came": steady_came(1e-3, weight_decay=0.1),
    "without momentum": steady_came(1e-3, b1=0.0),
    "no decay at all": came(1e-3, b1=0.0, b2=0.0, b3=0.0, bias_correction=True),
    "bfloat16": came(1e-3, mu_dtype="bfloat16", factoring=Stacked(where="kernel")),
    "int8": steady_came(1e-3, mu_dtype="int8"),
    "int4": came(1e-3, mu_dtype="int4"),
    "quantized_ema": quantized_ema(0.9, debias=True, nesterov=True),
    "came_muon": came_muon(1e-3, hidden="kernel"),
}


@pytest.fixture(params=["jitted", "not jitted"])
def checks(request):
    jitted = request.param == "jitted"
    with jax.debug_nans(True), jax.debug_infs(True), jax.disable_jit(not jitted):
        yield


@pytest.mark.slow(but=1)
@pytest.mark.parametrize("name", CHECKED)
@pytest.mark.usefixtures("checks")
def test_no_nan_or_infinity_in_an_update(name):
    def gradients(step):
        rng = np.random.default_rng(step)
        g = {"kernel": rng.normal(size=(64, 66)), "bias": rng.normal(size=9)}
        g["kernel"][3], g["kernel"][:, 5] = 0, 0  # They never have any.
        g |= {"zeros": np.zeros((6, 5)), "one": np.ones(()), "no": np.zeros((0, 3))}
        return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), g)

    tx, params = CHECKED[name], gradients(0)
    state, update = tx.init(params), jax.jit(tx.update)
    for step in range(3):
        _, state = update(gradients(step), state, params)


@pytest.mark.slow(but=2)
@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.usefixtures("checks")
def test_no_nan_or_infinity_in_master_weights(bits, dtype):
    largest = float(jnp.finfo(dtype).max)
    params = jnp.array([0.0, -0.0, 1.0, -3.3, 1e-40, largest, -largest], dtype)
    tx = with_master_weights(optax.sgd(1.0), bits)
    for grads in (jnp.zeros_like(params), jnp.full_like(params, 1e-3)):
        updates, _ = tx.update(grads, tx.init(params), params)
        assert jnp.isfinite(updates).all()


def test_the_checks_would_find_some():
    with jax.debug_nans(True), pytest.raises(FloatingPointError, match="nan"):
        jnp.zeros(2) / jnp.zeros(2)
    with jax.debug_infs(True), pytest.raises(FloatingPointError, match="inf"):
        jnp.ones(2) / jnp.zeros(2)

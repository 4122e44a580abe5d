"""Momentum stored in 16, 8 and 4 bits, in CAME and in any chain."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from came_optax import (
    BalancedSplit,
    Codes,
    LargestTwoAxes,
    LastTwoAxes,
    Stacked,
    came,
    quantized_ema,
    scale_by_came,
    scale_by_confidence,
    steady_came,
)
from tests.draws import normal

quantized = pytest.mark.parametrize("mu_dtype", ["int8", "int4"])

SHAPES = [(4096,), (5001,), (64, 64), (67, 65), (1031, 6)]
SHAPES += [(3, 37, 41), (3, 5, 17, 19), (2, 2, 32, 33)]
# Codes and scales together would take more than the array.
THIN = [(1, 4097), (4097, 1), (4, 1, 1024), (7, 7, 1, 96)]


def left_after(mu_dtype, steps, noise=1.0, constant=0.0, b1=0.9):
    """How far pruned elements still move, relative to those that live on."""
    tx = scale_by_came(b1=b1, mu_dtype=mu_dtype, bias_correction=True)
    pruned = jnp.asarray(np.random.default_rng(0).random((64, 96)) < 0.3)
    signs = jnp.sign(normal((64, 96)))

    def step(state, t):
        key = jax.random.fold_in(jax.random.key(0), t)
        g = constant * signs + noise * jax.random.normal(key, (64, 96))
        updates, state = tx.update(jnp.where(pruned & (t >= 100), 0.0, g), state)
        return state, updates

    @jax.jit
    def run():
        state = tx.init(jnp.zeros((64, 96)))
        return jax.lax.scan(step, state, jnp.arange(100 + steps, dtype=jnp.int32))[1]

    last = jnp.abs(run()[-1])
    return float(jnp.mean(last, where=pruned) / jnp.mean(last, where=~pruned))


@pytest.mark.parametrize(("noise", "constant"), [(1.0, 0.0), (0.0, 1.0)])
@quantized
def test_momentum_of_zero_gradients_decays(mu_dtype, noise, constant):
    """In nearest codes of 4 bits 22 % of it would stay, or 64 % without noise."""
    assert left_after(mu_dtype, 200, noise, constant) <= 0.02


@pytest.mark.slow
@quantized
def test_momentum_decays_with_a_slow_rate_too(mu_dtype):
    exact = left_after("float32", 100, b1=0.99)
    assert left_after(mu_dtype, 100, b1=0.99) < 1.5 * exact


@pytest.mark.parametrize(
    ("b1", "forgets"), [(0.9, True), (0.996, True), (0.998, False)]
)
def test_the_slowest_rate_at_which_bfloat16_forgets(b1, forgets):
    """The docstring of ``mu_dtype`` says so; float32 and codes always forget."""
    tx, g = scale_by_came(b1=b1, mu_dtype="bfloat16"), normal((8, 8))

    @jax.jit
    def run():
        _, state = tx.update(g, tx.init(g))
        step = lambda state, _: (tx.update(jnp.zeros_like(g), state)[1], None)  # noqa: E731
        return state.mu, jax.lax.scan(step, state, None, 3000)[0].mu

    before, after = run()
    left = jnp.abs(after.astype("float32") / before.astype("float32"))
    assert (left.max() < 1e-4) if forgets else (left.min() > 0.5)


@quantized
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_bad_gradients_are_not_forgotten(bad, mu_dtype):
    grads, tx = {"x": normal((64, 64))}, came(1e-3, mu_dtype=mu_dtype)
    update = jax.jit(tx.update)
    _, state = update({"x": grads["x"].at[3, 5].set(bad)}, tx.init(grads), grads)
    updates, _ = update(grads, state, grads)
    assert not jnp.isfinite(updates["x"]).all()


@pytest.mark.parametrize(
    ("mu_dtype", "dtype", "shape", "bytes_each"),
    [
        (None, "float32", (64, 64), 4),
        ("float32", "float32", (64, 64), 4),
        (jnp.float32, "bfloat16", (64, 64), 4),
        ("bfloat16", "float32", (64, 64), 2),
        (jnp.bfloat16, "float32", (64, 64), 2),
        ("int8", "float32", (64, 64), 1),
        (jnp.dtype("int8"), "bfloat16", (64, 64), 1),
        (jnp.int8, "float16", (5000,), 1),
        ("int8", "float32", (64, 63), 4),
        ("int8", "complex64", (64, 64), 8),
        ("int4", "float32", (64, 64), 0.5),
        (jnp.int4, "float32", (65, 64), 0.5),
        ("int4", "float32", (8, 24, 32), 0.5),
        ("int4", "float32", (1031, 6), 520 / 1031),  # Rows padded to 65 × 16.
        ("int4", "float16", (5000,), 0.5),
        ("int4", "float32", (64, 63), 4),
        ("int4", "complex64", (64, 64), 8),
    ],
)
def test_bytes(mu_dtype, dtype, shape, bytes_each):
    params = {"x": jnp.ones(shape, dtype)}
    mu = optax.tree.get(came(1e-3, mu_dtype=mu_dtype).init(params), "mu")["x"]
    stored = mu.values if isinstance(mu, Codes) else mu
    assert stored.nbytes == bytes_each * params["x"].size


@pytest.mark.parametrize("mu_dtype", [None, "bfloat16", "int8", "int4"])
@pytest.mark.parametrize(
    "rule",
    [LastTwoAxes(4), BalancedSplit(4), LargestTwoAxes(8), Stacked(LastTwoAxes(4))],
)
def test_no_state_is_larger_than_adams(rule, mu_dtype):
    """But for what stands for arrays that the leaf lacks, of 4 bytes each.

    Two statistics of rows and two of columns are no more than one of the whole where
    there are four of each.
    """

    def size(mu_dtype, p):
        tx = scale_by_came(factoring=rule, mu_dtype=mu_dtype)
        arrays = jax.tree.leaves(jax.eval_shape(tx.init, p))
        assert all(x.size for x in arrays)
        return sum(
            x.size * x.dtype.itemsize for x in arrays if x.shape not in ((), (1,))
        )

    odd = [(64, 32, 1, 1), (512, 2), (2, 768), (4096, 1), (8, 4), (1, 1)]
    for shape in [*SHAPES, *THIN, *odd]:
        p = jax.ShapeDtypeStruct(shape, jnp.float32)
        assert size(mu_dtype, p) <= min(8 * p.size, size(None, p)), shape


@quantized
def test_only_what_is_stored_is_rounded(mu_dtype):
    grads = normal((64, 65))

    @functools.partial(jax.jit, static_argnums=1)
    def two_updates(grads, mu_dtype):
        tx = came(1e-3, mu_dtype=mu_dtype)
        first, state = tx.update(grads, tx.init(grads), grads)
        return first, tx.update(grads, state, grads)[0]

    first, second = two_updates(grads, mu_dtype)
    exact_first, exact_second = two_updates(grads, "float32")
    chex.assert_trees_all_close(first, exact_first, rtol=1e-5)
    assert jnp.abs(second - exact_second).max() > 1e-4 * jnp.abs(second).max()


@quantized
def test_a_stack_is_its_layers(mu_dtype):
    layers = [normal((64, 64), seed=i) * 10.0**i for i in range(3)]

    @functools.partial(jax.jit, static_argnums=1)
    def two_updates(grads, factoring):
        tx = scale_by_confidence(mu_dtype=mu_dtype, factoring=factoring)
        _, state = tx.update(grads, tx.init(grads))
        return tx.update(grads, state)[0]

    updates = two_updates(jnp.stack(layers), Stacked())
    expected = jnp.stack([two_updates(layer, LastTwoAxes()) for layer in layers])
    chex.assert_trees_all_close(updates, expected, rtol=1e-5)


@pytest.mark.skipif(
    jax.__version_info__ < (0, 10),
    reason="the XLA of jax 0.8.1 takes 48 KiB more than the bound",
)
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "leaves"), [("steady_came", (1, 1, 2)), ("quantized_ema", (3, 2, 3))]
)
def test_temporaries_of_codes_are_not_all_leaves(name, leaves):
    """What passes share of coded momentum is one array, for one leaf after the other.

    In bfloat16 it is that of two leaves; in float32 momentum itself is the place. An
    average's last pass may come later: three of six leaves are there at once.
    """
    params = {str(i): jax.ShapeDtypeStruct((256, 512), jnp.float32) for i in range(6)}

    def temporaries(mu_dtype):
        tx = steady_came(1e-3, mu_dtype=mu_dtype)
        if name == "quantized_ema":
            average = quantized_ema(0.95, nesterov=True, mu_dtype=mu_dtype)
            tx = optax.chain(average, optax.scale(-1e-3))

        def step(params, state, grads):
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        state = jax.eval_shape(tx.init, params)
        compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params)
        return compiled.compile().memory_analysis().temp_size_in_bytes

    leaf, of_array = 4 * 256 * 512, temporaries("float32")
    assert of_array < leaf / 4
    for mu_dtype, most in zip(("int8", "int4", "bfloat16"), leaves, strict=True):
        assert temporaries(mu_dtype) <= of_array + (most + 0.1) * leaf


LONG = jnp.ones((65,))


@pytest.mark.parametrize(
    ("made_with", "change", "mu_dtype", "error"),
    [
        ("float32", {}, "int8", "mu of leaf 'x' has dtype float32.*must be Codes"),
        ("int4", {}, "int8", "mu.values of leaf 'x' has dtype uint8"),
        (
            "int8",
            {"row_scale": LONG},
            "int8",
            r"mu.row_scale of leaf 'x' has shape \(65",
        ),
        ("int8", {}, "float32", "mu of leaf 'x' is codes.*must be an array"),
    ],
)
def test_states_of_another_dtype_or_shape_are_refused(
    made_with, change, mu_dtype, error
):
    params = {"x": jnp.ones((64, 64))}
    state = scale_by_confidence(mu_dtype=made_with).init(params)
    if change:
        state = state._replace(mu={"x": state.mu["x"]._replace(**change)})
    with pytest.raises((TypeError, ValueError), match=error):
        scale_by_confidence(mu_dtype=mu_dtype).update(params, state)

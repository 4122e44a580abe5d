"""Stochastic rounding: unbiased, between the two neighbours, and exact elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from came_optax import came, stochastic_apply_updates

NARROW = [jnp.bfloat16, jnp.float16]
N = 100_000


def rounded(exact: float, dtype, seed: int = 0):
    """Applies an update from a number of ``dtype`` to ``exact``, N times over."""
    start = jnp.full(N, exact).astype(dtype)
    update = jnp.full(N, exact) - start.astype(jnp.float32)
    apply = jax.jit(stochastic_apply_updates)
    new = apply({"w": start}, {"w": update}, jax.random.key(seed))["w"]
    assert new.dtype == dtype
    return np.asarray(new, np.float64)


@pytest.mark.slow(but=5)
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("exact", [1.001, -1.001, 0.1, 300.3, -7.77e-3, 3.3e-7, 2**14])
def test_rounds_to_a_neighbour_and_is_unbiased(dtype, exact):
    exact = float(np.float32(exact))
    values = rounded(exact, dtype)
    nearest = jnp.asarray(exact).astype(dtype)
    neighbours = [
        jnp.nextafter(nearest, jnp.asarray(s * jnp.inf, dtype)) for s in (-1, 1)
    ]
    low, high = (
        (nearest, neighbours[1])
        if float(nearest) <= exact
        else (neighbours[0], nearest)
    )
    assert set(values) <= {float(low), float(high)}
    gap = float(high) - float(low)
    p = (exact - float(low)) / gap
    error = 5 * gap * np.sqrt(max(p * (1 - p), 1e-12) / N)
    np.testing.assert_allclose(values.mean(), exact, rtol=1e-9, atol=error)


@pytest.mark.parametrize("dtype", NARROW)
def test_what_the_dtype_holds_is_exact(dtype):
    exact = np.array([0.0, 1.0, -1.5, 2.0**-14, float(jnp.finfo(dtype).max)])
    for x in exact:
        np.testing.assert_array_equal(rounded(x, dtype), x)


@pytest.mark.parametrize("dtype", NARROW)
def test_beyond_the_range_and_not_finite(dtype):
    biggest = jnp.finfo(dtype).max
    params = jnp.array([biggest, -biggest, 1.0, jnp.nan, jnp.inf], dtype)
    updates = jnp.array([biggest, -biggest, jnp.nan, 1.0, 1.0], dtype)
    new = stochastic_apply_updates(params, updates, jax.random.key(0))
    np.testing.assert_array_equal(
        np.asarray(new, np.float32), [np.inf, -np.inf, np.nan, np.nan, np.inf]
    )


def test_elements_leaves_and_keys_differ():
    params = {"a": jnp.ones(1000, jnp.bfloat16), "b": jnp.ones(1000, jnp.bfloat16)}
    updates = jax.tree.map(lambda p: jnp.full_like(p, 4e-3), params)
    one = stochastic_apply_updates(params, updates, jax.random.key(1))
    other = stochastic_apply_updates(params, updates, jax.random.key(2))
    same = stochastic_apply_updates(params, updates, jax.random.key(1))
    for x, y in ((one["a"], one["b"]), (one["a"], other["a"])):
        correlation = np.corrcoef(np.asarray(x, float), np.asarray(y, float))[0, 1]
        assert abs(correlation) < 0.15
    assert jax.tree.all(jax.tree.map(lambda x, y: (x == y).all(), one, same))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.complex64])
def test_wider_leaves_are_as_optax_has_them(dtype):
    key = jax.random.key(0)
    params = {"w": jax.random.normal(key, (50,), dtype), "absent": None}
    updates = {"w": 1e-3 * jax.random.normal(key, (50,), dtype), "absent": None}
    ours = stochastic_apply_updates(params, updates, key)
    expected = optax.apply_updates(params, updates)
    jax.tree.map(np.testing.assert_array_equal, ours, expected)
    jax.tree.map(lambda x, y: x.dtype == y.dtype or pytest.fail(), ours, expected)


def test_trains_where_rounding_to_nearest_moves_nothing():
    """Weights of 1.0 and a learning rate of 2e-5, for 300 steps."""
    tx = came(2e-5, bias_correction=True)
    params = {"w": jnp.ones((64, 64), jnp.bfloat16)}
    grads = {"w": jnp.ones((64, 64), jnp.bfloat16)}

    def train(apply):
        def step(carry, key):
            params, state = carry
            updates, state = tx.update(grads, state, params)
            return (apply(params, updates, key), state), None

        keys = jax.random.split(jax.random.key(0), 300)
        (new, _), _ = jax.lax.scan(step, (params, tx.init(params)), keys)
        return np.asarray(new["w"], np.float64)

    def nearest(params, updates, key):
        del key
        return optax.apply_updates(params, updates)

    np.testing.assert_array_equal(train(nearest), 1.0)
    moved = train(stochastic_apply_updates).mean() - 1.0

    state, total = tx.init(params), 0.0
    update = jax.jit(tx.update)
    for _ in range(300):
        updates, state = update(grads, state, params)
        total += float(updates["w"].astype(jnp.float32).mean())
    np.testing.assert_allclose(moved, total, rtol=0.05)


@pytest.mark.parametrize(
    ("key", "given"),
    [
        (0, "int"),
        (jax.random.split(jax.random.key(0), 2), r"of shape \(2,\)"),
        (jnp.zeros(2), "float32"),
        (None, "NoneType"),
    ],
)
def test_a_wrong_key_is_named(key, given):
    params = {"w": jnp.ones(3)}
    with pytest.raises(TypeError, match=f"key must be a single random key.*{given}"):
        stochastic_apply_updates(params, params, key)


def test_wrong_shapes_are_named():
    params, updates = {"w": jnp.ones(3)}, {"w": jnp.ones((3, 3))}
    with pytest.raises(ValueError, match="leaf 'w' has shape"):
        stochastic_apply_updates(params, updates, jax.random.PRNGKey(0))

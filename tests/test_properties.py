"""What holds for every shape, factoring and gradient."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from came_optax import (
    BalancedSplit,
    ByPath,
    FactoredAxes,
    LargestTwoAxes,
    LastTwoAxes,
    Stacked,
    came,
    scale_by_came,
)

STEPS = 3
EXAMPLES = settings.default.max_examples  # 25, unless --hypothesis-profile says so.

rules = st.sampled_from([LastTwoAxes(), LargestTwoAxes(2), BalancedSplit()])
options = st.sampled_from(
    [
        {},
        {"bias_correction": True},
        {"update_clipping_threshold": 0.5},
        {"clipping_threshold": 0.1, "bias_correction": True},
    ]
)


def shapes(min_dims=0, max_dims=4):
    dims = st.lists(st.integers(1, 4), min_size=min_dims, max_size=max_dims)
    return dims.map(tuple)


def fixed(axes):
    """A rule that gives every leaf the same axes."""
    return ByPath({"": axes})


UNFACTORED = [LargestTwoAxes(9), fixed(FactoredAxes())]


@st.composite
def factored_axes(draw, ndim):
    """Any way of using the axes for rows, columns, stacks or batches."""
    uses = draw(st.permutations(["row", "col"] + ["batch", "stack"] * ndim))[:ndim]
    roles = {
        role: tuple(axis for axis, use in enumerate(uses) if use == role)
        for role in ("row", "col", "stack")
    }
    assume(bool(roles["row"]) == bool(roles["col"]))
    return FactoredAxes(**roles)


def gradients(shape, seed=0):
    """Returns gradients of some steps, each row and column of another scale."""
    rng = np.random.default_rng(seed)
    g = rng.normal(size=(STEPS, *shape))
    for axis, size in enumerate(shape):
        g = np.moveaxis(
            np.moveaxis(g, axis + 1, -1) * rng.lognormal(size=size), -1, axis + 1
        )
    return jnp.asarray(g, jnp.float32)


def run(tx, grads):
    """Returns each step's update, and the last state."""

    def step(state, g):
        updates, state = tx.update(g, state)
        return state, updates

    @jax.jit
    def steps(grads):
        state = tx.init(jax.tree.map(lambda g: g[0], grads))
        state, updates = jax.lax.scan(step, state, grads)
        return updates, state

    return steps(grads)


def test_most_draws_are_factored():
    factored = []

    @given(data=st.data(), shape=shapes(min_dims=1), rule=rules)
    @settings(max_examples=100)
    def draw(data, shape, rule):
        axes = data.draw(factored_axes(len(shape)))
        factored.append([bool(rule.axes((), shape)), axes.factored])

    draw()
    assert np.all(np.mean(factored, axis=0) > 0.3)


@given(data=st.data(), shape=shapes(), dtype=st.sampled_from(["bfloat16", "float32"]))
@settings(max_examples=2 * EXAMPLES)
def test_statistics_have_the_announced_shapes(data, shape, dtype):
    axes = data.draw(factored_axes(len(shape)))
    tx = scale_by_came(factoring=fixed(axes))
    leaf = jax.ShapeDtypeStruct(shape, dtype)
    state = jax.eval_shape(tx.init, leaf)

    def without(reduced):
        return tuple(n for axis, n in enumerate(shape) if axis not in reduced)

    row, col = without(axes.col), without(axes.row)
    row, col = (row, col) if axes.factored else ((1,), (1,))
    expected = {"v_row": row, "s_row": row, "v_col": col, "s_col": col, "mu": shape}
    expected["v"] = (1,) if axes.factored else shape
    for name, statistic_shape in expected.items():
        statistic = optax.tree.get(state, name)
        assert (statistic.shape, statistic.dtype) == (statistic_shape, jnp.float32)

    updates, after = jax.eval_shape(tx.update, leaf, state)
    assert (updates.shape, updates.dtype) == (shape, dtype)
    assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, state)


@given(data=st.data(), shape=shapes(min_dims=1), rule=rules, kwargs=options)
@settings(max_examples=EXAMPLES // 2)
def test_a_stack_equals_its_layers(data, shape, rule, kwargs):
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    grads = gradients(shape)
    layers = jnp.unstack(grads, axis=axis % len(shape) + 1)
    layer_tx = came(1e-2, factoring=rule, **kwargs)
    stack_tx = came(1e-2, factoring=Stacked(rule, axis), **kwargs)
    together, _ = run(stack_tx, grads)
    separate, _ = run(layer_tx, list(layers))
    stacked = jnp.stack(separate, axis=axis % len(shape) + 1)
    chex.assert_trees_all_close(together, stacked, rtol=1e-4, atol=1e-7)


@pytest.mark.slow
@given(
    shape=shapes(),
    kwargs=options,
    rule=st.sampled_from(UNFACTORED),
)
@settings(max_examples=EXAMPLES // 2)
def test_factoring_nothing_equals_a_vector(shape, kwargs, rule):
    grads = gradients(shape)
    whole, _ = run(came(1e-2, factoring=rule, **kwargs), grads)
    flat, _ = run(came(1e-2, **kwargs), grads.reshape(STEPS, -1))
    chex.assert_trees_all_close(whole, flat.reshape(whole.shape), rtol=1e-4, atol=1e-7)


@pytest.mark.slow
@given(data=st.data(), shape=shapes(min_dims=2), kwargs=options)
@settings(max_examples=EXAMPLES // 2)
def test_permuted_axes_permute_the_update(data, shape, kwargs):
    axes = data.draw(factored_axes(len(shape)))
    order = data.draw(st.permutations(range(len(shape))))

    def moved(some):
        return tuple(order.index(axis) for axis in some)

    # Rows and columns change places too: neither is special.
    permuted = FactoredAxes(moved(axes.col), moved(axes.row), moved(axes.stack))
    grads = gradients(shape)
    updates, _ = run(came(1e-2, factoring=fixed(axes), **kwargs), grads)
    transposed, _ = run(
        came(1e-2, factoring=fixed(permuted), **kwargs),
        grads.transpose(0, *(axis + 1 for axis in order)),
    )
    expected = updates.transpose(0, *(axis + 1 for axis in order))
    chex.assert_trees_all_close(transposed, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.slow
@given(shape=shapes(), rule=rules, angle=st.floats(0, 6))
@settings(max_examples=EXAMPLES // 2)
def test_complex_gradients_turn_the_update(shape, rule, angle):
    grads, turn = gradients(shape), jnp.asarray(np.exp(1j * angle), jnp.complex64)
    tx = came(1e-2, factoring=rule)
    real, turned = run(tx, [grads, turn * grads.astype(jnp.complex64)])[0]
    expected = turn * real.astype(jnp.complex64)
    chex.assert_trees_all_close(turned, expected, rtol=1e-4, atol=1e-6)


@given(shape=shapes(), rule=rules, limit=st.sampled_from([0.01, 0.5, 1.0]))
@settings(max_examples=EXAMPLES // 2)
def test_both_clips_bound_the_root_mean_square(shape, rule, limit):
    # Without momentum, mu is the clipped u.
    tx = scale_by_came(
        b1=0.0,
        clipping_threshold=limit,
        update_clipping_threshold=limit,
        factoring=rule,
    )
    updates, state = run(tx, gradients(shape))
    for x in [*updates, optax.tree.get(state, "mu")]:
        assert jnp.sqrt(jnp.mean(x**2)) <= limit * (1 + 1e-5)

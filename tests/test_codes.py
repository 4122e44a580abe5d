"""Codes of 8 and 4 bits: near to what they stand for, and right on average."""

import functools
import math

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from came_optax import FactoredAxes, _codes, convert_state, steady_came
from tests.draws import normal

# The largest distance between neighbouring codes, which is 3/2 of the mean one.
LARGEST_ERROR = {"int8": 1.5 / 127, "int4": 1.5 / 7}
BITS = {"int8": 8, "int4": 4}
EXAMPLES = hypothesis.settings.default.max_examples
quantized = pytest.mark.parametrize("mu_dtype", LARGEST_ERROR)
SHAPES = [(4096,), (5001,), (64, 64), (67, 65), (1031, 6)]


@functools.partial(jax.jit, static_argnums=1)
def round_trip(m, mu_dtype, step=1):
    """Returns what the next step reads of momentum ``m``."""
    n = m.ndim
    axes = FactoredAxes((n - 2,), (n - 1,)) if n > 1 else FactoredAxes()
    step, largest = jnp.int32(step), _codes.largest
    codes = _codes.encode(lambda: m, axes, BITS[mu_dtype], step, largest)
    return _codes.decode(codes, m, axes)


def mean_over_steps(m, mu_dtype, steps):
    read = jax.vmap(lambda i: round_trip(m, mu_dtype, i))(jnp.arange(steps))
    return jnp.mean(read, 0)


def largest(m):
    """The smaller of the largest magnitudes in each element's row and column."""
    m = np.abs(m)
    row = m.max(-1, keepdims=True)
    return row if m.ndim == 1 else np.minimum(row, m.max(-2, keepdims=True))


def check_error(shape, mu_dtype, seed=0):
    m = np.asarray(normal(shape, seed=seed) * 10 ** normal(shape[-1:], seed=1))
    error = np.abs(round_trip(m, mu_dtype) - m)
    assert (error <= 1.001 * LARGEST_ERROR[mu_dtype] * largest(m)).all()


@quantized
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_is_a_step_of_the_row_or_column(shape, mu_dtype):
    with jax.numpy_rank_promotion("allow"):
        check_error(shape, mu_dtype)


@hypothesis.settings(max_examples=EXAMPLES // 2)
@hypothesis.given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    mu_dtype=st.sampled_from(list(LARGEST_ERROR)),
    seed=st.integers(0, 100),
)
def test_and_so_it_is_for_any_shape(shape, mu_dtype, seed):
    with jax.numpy_rank_promotion("allow"):
        check_error((*shape, -(-4096 // math.prod(shape))), mu_dtype, seed)


@quantized
def test_what_is_extreme_in_its_row_and_column_is_kept(mu_dtype):
    m = jnp.diag(normal((64,)))
    for step in range(20):
        chex.assert_trees_all_close(round_trip(m, mu_dtype, step), m, rtol=3e-7)


@quantized
def test_small_values_keep_finer_codes(mu_dtype):
    m = jnp.linspace(-1, 1, 8193)
    error = jnp.abs(round_trip(m, mu_dtype) - m)
    assert error.max() == pytest.approx(LARGEST_ERROR[mu_dtype], rel=0.15)
    assert error[jnp.abs(m) < 0.1].max() < 0.6 * error.max()


@quantized
def test_the_mean_over_steps_is_exact(mu_dtype):
    """To a fortieth of the distance of codes; to the nearest it would be a fourth."""
    m = normal((64, 64))
    error = jnp.abs(mean_over_steps(m, mu_dtype, 512) - m) / jnp.asarray(largest(m))
    assert error.max() <= LARGEST_ERROR[mu_dtype] / 40


@quantized
def test_the_mean_over_steps_is_exact_relative_to_small_values_too(mu_dtype):
    """Rounded evenly between codes, not levels, they would be up to 14 % too large."""
    m = jnp.concatenate([jnp.ones(1), 10.0 ** jnp.linspace(-2.7, 0, 63)])
    m = m * jnp.where(jnp.arange(64) % 2 == 0, 1, -1)
    np.testing.assert_allclose(mean_over_steps(m, mu_dtype, 8192), m, rtol=0.01)


@quantized
@pytest.mark.parametrize("size", [2.0**-100, 2.0**-60, 2.0**60, 2.0**126])
def test_tiny_and_huge_values(size, mu_dtype):
    m = normal((64, 64))
    m = m / jnp.abs(m).max()
    read = round_trip(m * size, mu_dtype) / size
    chex.assert_trees_all_equal(read, round_trip(m, mu_dtype))


@quantized
@pytest.mark.parametrize("sign", [1, -1])
def test_no_largest_magnitude_becomes_a_larger_one(mu_dtype, sign):
    """At each of these steps some threshold is within 2⁻²² of 1."""
    m = sign * jnp.ones((64, 64))
    for step in (18, 283, 304):
        np.testing.assert_allclose(round_trip(m, mu_dtype, step), m, rtol=1e-6)
    axes, ones = FactoredAxes((0,), (1,)), jnp.ones(64)
    every = jax.vmap(lambda i: _codes._thresholds(m, ones, ones, axes, i))
    assert 7 + jnp.max(every(jnp.arange(4096))) < 8


@quantized
def test_zero_rows_columns_and_leaves_stay_zero(mu_dtype):
    m = normal((64, 64)).at[7].set(0).at[:, 9].set(0)
    read = round_trip(m, mu_dtype)
    assert not read[7].any() and not read[:, 9].any()
    assert read.any()
    chex.assert_trees_all_equal(round_trip(0 * m, mu_dtype), 0 * m)


def test_codes_made_before_a_mesh_was_entered():
    params = {"kernel": jnp.ones((64, 128))}
    tx = steady_came(1e-3, mu_dtype="int4")
    _, state = tx.update(params, tx.init(params), params)
    expected, _ = tx.update(params, state, params)
    mesh = jax.make_mesh((1,), ("fsdp",), axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh):
        updates, _ = tx.update(params, state, params)
        convert_state(state, params, old=tx, new=steady_came(1e-3))
    chex.assert_trees_all_close(updates, expected, rtol=1e-5)

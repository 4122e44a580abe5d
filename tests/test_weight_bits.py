"""A float32 weight as a narrow parameter and the bits that it lacks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from came_optax import (
    MasterWeightsState,
    master_weights,
    split_weights,
    with_master_weights,
)

NARROW = [jnp.bfloat16, jnp.float16]


# At and beside a bfloat16, and half way to the next.
LOWER = [0, 1, 2, 0x1234, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0xEDCB, 0xFFFE, 0xFFFF]
EVERY_UPPER = np.arange(2**16, dtype=np.uint32) << 16


def float32(bits):
    return np.asarray(bits, np.uint32).view(np.float32)


def bits_of(x):
    return np.asarray(x).view({2: np.uint16, 4: np.uint32}[x.dtype.itemsize])


@pytest.mark.parametrize("lower", LOWER, ids=hex)
def test_every_float32_is_a_bfloat16_nearest_to_it_and_a_remainder(lower):
    weights = float32(EVERY_UPPER + np.uint32(lower))
    params, remainder = jax.jit(functools.partial(split_weights, bits=32))(weights)
    state = MasterWeightsState(0, remainder, ())
    nan = np.isnan(weights)
    np.testing.assert_array_equal(
        bits_of(master_weights(params, state))[~nan], bits_of(weights)[~nan]
    )
    assert np.isnan(master_weights(params, state)[nan]).all()
    assert np.isnan(np.asarray(params, np.float32)[nan]).all()
    away_from_zero = EVERY_UPPER + np.uint32(2**16 if lower >= 2**15 else 0)
    np.testing.assert_array_equal(bits_of(params)[~nan], (away_from_zero >> 16)[~nan])


@pytest.mark.parametrize("lower", [x for x in LOWER if x % 2**13 == x], ids=hex)
def test_float16_is_exact_in_its_range_and_has_a_fixed_point_below(lower):
    weights = float32((np.arange(2**19, dtype=np.uint32) << 13) + np.uint32(lower))
    weights = weights[np.isfinite(weights)]
    size = np.abs(weights)
    params, remainder = split_weights(jnp.asarray(weights), 32, jnp.float16)
    back = np.asarray(master_weights(params, MasterWeightsState(0, remainder, ())))
    exact, small = (size >= 2.0**-17) & (size < 65_520), size < 2.0**-17
    np.testing.assert_array_equal(back[exact], weights[exact])
    assert (np.abs(back - weights)[small] <= 2.0**-41).all()
    nearest = np.asarray(weights[size < 65_520], np.float16).astype(np.float32)
    error = np.abs(np.asarray(params, np.float32) - weights)
    assert (error[size < 65_520] <= np.abs(nearest - weights[size < 65_520])).all()
    assert np.isinf(np.asarray(params, np.float32)[size >= 65_520]).all()


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("bits", [24, 32])
def test_an_old_remainder_is_less_than_half_the_distance_to_the_next(bits, dtype):
    """Whatever was done to a parameter, rounding its weight gives the parameter."""
    params = jax.lax.bitcast_convert_type(jnp.arange(2**16, dtype=jnp.uint16), dtype)
    nan, of_params = np.isnan(np.float32(params)), np.float32(params)

    @jax.jit
    def rounded(old):
        kind = jnp.int8 if bits == 24 else jnp.int16
        remainder = jnp.full(2**16, old * 2 ** (bits - 24)).astype(kind)
        weights = master_weights(params, MasterWeightsState(0, remainder, ()))
        return weights, split_weights(weights, 32, dtype)[0]

    for old in range(-(2**7), 2**7):
        weights, again = map(np.float32, rounded(jnp.int32(old)))
        assert np.isnan(weights[nan]).all()
        np.testing.assert_array_equal(again[~nan], of_params[~nan])


def apply(params, updates):
    with jax.numpy_dtype_promotion("standard"):  # For bfloat16 and float32.
        return optax.apply_updates(params, updates)


def any_floats(n, seed, exponents):
    rng = np.random.default_rng(seed)
    exponent = rng.integers(*np.add(exponents, 127), n, dtype=np.uint32)
    rest = rng.integers(2**23, size=n, dtype=np.uint32)
    return float32(
        (rng.integers(2, size=n, dtype=np.uint32) << 31) | (exponent << 23) | rest
    )


N = 200_000
WEIGHTS = any_floats(N, 0, (-60, 60))
ULPS = np.random.default_rng(1).integers(-300, 300, N, dtype=np.int32)
STEPS = {
    "tiny": WEIGHTS * any_floats(N, 1, (-30, -10)),
    "alike": WEIGHTS * any_floats(N, 1, (-3, 3)),
    "by 30 exponents": WEIGHTS * any_floats(N, 1, (28, 31)),
    "to 0": -WEIGHTS,
    "to nearly 0": -(WEIGHTS.view(np.int32) + ULPS).view(np.float32),
    "any": any_floats(N, 1, (-126, 127)),
    "to the largest": np.full(N, np.finfo(np.float32).max),
    "to infinity": np.full(N, np.inf, np.float32),
    "to NaN": np.full(N, np.nan, np.float32),
}


def after_a_step(weights, steps, bits, dtype=jnp.bfloat16):
    """Returns parameters and weights after one step, and what float32 makes of it."""
    tx = with_master_weights(optax.identity(), bits)

    @jax.jit
    def step(weights, steps):
        params, remainder = split_weights(weights, bits, dtype)
        state = tx.init(params)._replace(remainder=remainder)
        updates, state = tx.update(steps, state, params)
        params = apply(params, updates)
        return params, master_weights(params, state), weights + steps

    return map(np.asarray, step(jnp.asarray(weights), jnp.asarray(steps)))


@pytest.mark.parametrize("name", STEPS)
def test_a_step_in_32_bits_is_float32s(name):
    params, weights, expected = after_a_step(WEIGHTS, STEPS[name], 32)
    # The one case in which no float32 leads from one parameter to the other.
    start = np.asarray(split_weights(WEIGHTS, 32)[0], np.float32)
    crossed = np.abs(expected) < 2.0**-14 * np.abs(WEIGHTS)
    crossed &= (np.abs(start) > np.abs(WEIGHTS)) & (
        np.signbit(expected) != np.signbit(WEIGHTS)
    )
    error = np.abs(weights[crossed] - expected[crossed])
    assert (error <= np.spacing(np.abs(STEPS[name][crossed]))).all()
    kept = ~crossed & ~np.isnan(expected)
    np.testing.assert_array_equal(bits_of(weights)[kept], bits_of(expected)[kept])
    np.testing.assert_array_equal(
        params[~crossed].astype(np.float32),
        np.asarray(split_weights(expected, 32)[0], np.float32)[~crossed],
    )


@pytest.mark.parametrize("start", [-0.0, 0.0, 1e-40, 3.4e38, np.inf, -np.inf, np.nan])
def test_what_is_rare_passes(start):
    """Zeros of both signs, what only float32 holds, and infinities stay."""
    weights, steps = np.full(3, start, np.float32), np.float32([0.0, -0.0, 1e30])
    _, after, expected = after_a_step(weights, steps, 32)
    np.testing.assert_array_equal(bits_of(after), bits_of(expected))
    # Nor is a difference beyond float32 infinite.
    weights = np.float32([-(2.0**127) * (1 + 2.0**-8 + 2.0**-20)])
    _, after, expected = after_a_step(weights, [np.finfo(np.float32).max], 32)
    np.testing.assert_allclose(after, expected, rtol=2**-7)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("bits", [24, 16])
def test_a_step_in_fewer_bits_is_near_and_right_on_average(bits, dtype):
    exponents = (-60, 60) if dtype == jnp.bfloat16 else (-14, 14)
    weights = np.asarray(
        split_weights(any_floats(N, 0, exponents), 16, dtype)[0], np.float32
    )
    steps = weights * any_floats(N, 1, (-20, -8))
    params, after, expected = after_a_step(weights, steps, bits, dtype)
    unit = 2.0 ** (16 - bits - jnp.finfo(dtype).nmant)
    error = ((after - expected) / (unit * np.abs(expected))).astype(np.float64)
    assert 0.4 < np.abs(error).max() < 1
    assert np.abs(error.mean()) < 5 * error.std() / np.sqrt(N)
    apart = np.abs(params.astype(np.float32) - after)
    half = 2.0 ** -(jnp.finfo(dtype).nmant + 1)
    assert (apart <= half * np.abs(after) * (1 + half)).all()

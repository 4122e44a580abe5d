"""A float32 weight as a narrow parameter and the bits that it lacks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from came_optax import MasterWeightsState, master_weights, split_weights

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

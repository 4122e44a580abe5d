"""The orthogonalisation of Muon against singular value decompositions, and optax's."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers

from came_optax import (
    BalancedSplit,
    ByMuonDimensionNumbers,
    ByPath,
    FactoredAxes,
    LastTwoAxes,
    Stacked,
    orthogonalize,
    quantized_ema,
)
from came_optax._orthogonalize import _PRESETS

PRESETS = pytest.mark.parametrize("preset", sorted(_PRESETS))
POLAR_EXPRESS = {"ns_coeffs": "polar_express", "consistent_rms": None}


def matrix(*shape, seed=0, dtype=np.float64):
    x = np.random.default_rng(seed).normal(size=shape)
    if np.issubdtype(dtype, np.complexfloating):
        x = x + 1j * np.random.default_rng(seed + 1).normal(size=shape)
    return x.astype(dtype)


def iterated(singular_values, preset):
    """What the iteration makes of singular values, in exact arithmetic."""
    x = singular_values / np.linalg.norm(singular_values)
    for a, b, c in _PRESETS[preset]:
        x = a * x + b * x**3 + c * x**5
    return x


def update(x, **options):
    tx = orthogonalize(**options)
    return jax.jit(tx.update)(x, tx.init(x))[0]


def scale(rows, columns):
    return math.sqrt(max(1, columns / rows))


def check(result, x, preset="standard", rtol=1e-4):
    """Asserts that singular vectors are those of ``x``, and values near 1."""
    x = np.asarray(x, np.result_type(x.dtype, np.float64))
    u, s, vh = np.linalg.svd(x / np.abs(x).max(), full_matrices=False)
    expected = scale(*x.shape) * (u * iterated(s, preset)) @ vh
    np.testing.assert_allclose(result, expected, atol=rtol * np.abs(expected).max())
    # The polar factor, as near as the coefficients bring what isn't next to zero.
    large = s > 0.006 * np.linalg.norm(s)
    error = (u.conj().T @ np.asarray(result) @ vh.conj().T) / scale(*x.shape)
    error = (error - np.eye(len(s)))[np.ix_(large, large)]
    assert np.linalg.norm(error, 2) < {"standard": 0.33, "polar_express": 0.17}[preset]


SHAPES = [(16, 16), (8, 32), (32, 8), (1, 9), (9, 1), (1, 1)]


@PRESETS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matrices_of_any_shape(shape, preset):
    x = matrix(*shape, dtype=np.float32)
    result = update(x, ns_coeffs=preset, consistent_rms=None)
    assert result.dtype == jnp.float32
    check(result, x, preset)


@PRESETS
@pytest.mark.parametrize("magnitude", [1e-30, 1e-8, 1e30, 3e38])
def test_matrices_of_any_magnitude(magnitude, preset):
    x = matrix(12, 20)
    x = np.float32(x / np.abs(x).max() * magnitude)
    check(update(x, ns_coeffs=preset, consistent_rms=None), x, preset)


def test_a_matrix_of_rank_one():
    x = np.outer(matrix(12), matrix(20, seed=1)).astype(np.float32)
    check(update(x, **POLAR_EXPRESS), x, "polar_express")


@pytest.mark.parametrize("fill", [0.0, 1e-45], ids=["zero", "subnormal"])
def test_zeros_stay_zeros(fill):
    np.testing.assert_array_equal(update(np.full((4, 6), fill, np.float32)), 0)


@pytest.mark.parametrize("dtype", [np.complex64, np.complex128, np.float64])
def test_complex_and_wide_matrices_stay_so(dtype):
    with jax.enable_x64(dtype != np.complex64):
        x = matrix(6, 10, dtype=dtype)
        result = update(x, **POLAR_EXPRESS)
        assert result.dtype == dtype
        rtol = 1e-4 if dtype == np.complex64 else 1e-12
        check(np.asarray(result), x, "polar_express", rtol)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_matrix_that_is_not_finite_is_nan_and_no_other(bad):
    x = matrix(3, 4, 6, dtype=np.float32)
    good = update(x, factoring=LastTwoAxes())
    x[1, 2, 3] = bad
    result = update(x, factoring=LastTwoAxes())
    assert np.isnan(result[1]).all()
    np.testing.assert_array_equal(result[::2], good[::2])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("x_dtype", [jnp.float32, jnp.bfloat16])
def test_the_iteration_in_16_bits(x_dtype, dtype):
    x = jnp.asarray(matrix(12, 20), x_dtype)
    result = update(x, dtype=dtype, consistent_rms=None)
    assert result.dtype == x_dtype
    result = np.asarray(result, np.float64)
    exact = update(np.asarray(x, np.float32), consistent_rms=None)
    assert np.abs(result - exact).max() > 1e-6  # It was done in 16 bits.
    assert np.linalg.norm(result - exact) < 0.05 * np.linalg.norm(exact)


@PRESETS
@pytest.mark.parametrize("shape", [(64, 64), (64, 256)], ids=str)
@pytest.mark.parametrize("smallest", [1.0, 1e-2, 1e-4])
def test_bfloat16_rounds_no_more_than_step_by_step(smallest, shape, preset):
    u, _, vh = np.linalg.svd(matrix(*shape), full_matrices=False)
    s = np.geomspace(1, smallest, 64)
    x = (u * s) @ vh / np.linalg.norm(s)
    y = jnp.asarray(x, jnp.bfloat16)
    for a, b, c in _PRESETS[preset]:
        gram = y @ y.T
        y = a * y + (b * gram + c * (gram @ gram)) @ y
    result = update(np.float32(x), ns_coeffs=preset, dtype="bfloat16")
    exact = (u * iterated(s, preset)) @ vh
    error, error_of_steps = (
        np.linalg.norm(np.asarray(z, np.float64) - exact)
        for z in (result / (0.2 * math.sqrt(shape[1])), y)
    )
    assert error < 1.02 * error_of_steps


def test_two_steps_of_a_wide_matrix_share_its_gram_matrix():
    m, n = 64, 256
    tx = orthogonalize()
    step = jax.jit(lambda x: tx.update(x, optax.EmptyState())[0])
    compiled = step.lower(jax.ShapeDtypeStruct((m, n), jnp.float32)).compile()
    assert compiled.cost_analysis()["flops"] < 0.85 * 5 * (4 * m * m * n + 2 * m**3)


def test_the_same_on_cpu_as_in_float32():
    x = matrix(12, 20, dtype=np.float32)
    chex.assert_trees_all_equal(update(x), update(x, dtype="float32"))


@pytest.mark.parametrize("shape", [(32, 32), (16, 64), (64, 16)])
def test_the_root_mean_square_is_consistent(shape):
    x = matrix(*shape, dtype=np.float32)
    result = update(x, ns_coeffs=_PRESETS["polar_express"], consistent_rms=0.2)
    assert np.sqrt(np.mean(result**2)) == pytest.approx(0.2, rel=0.1)


def test_fewer_steps():
    ((a, b, c), *_), x = _PRESETS["standard"], matrix(12, 20)
    options = {"ns_coeffs": ((a, b, c),), "consistent_rms": None}
    result = update(x.astype(np.float32), **options) / scale(12, 20)
    x = x / np.linalg.norm(x)
    gram = x @ x.T
    expected = a * x + (b * gram + c * gram @ gram) @ x
    np.testing.assert_allclose(result, expected, atol=1e-5)


def test_one_triple_is_that_of_five_steps():
    """As optax.contrib.muon takes it."""
    x, triple = matrix(12, 20), _PRESETS["standard"][0]
    np.testing.assert_array_equal(update(x, ns_coeffs=triple), update(x))


# A rule, a leaf's shape, and its axes in the order and the groups of the matrices.
EINSUM = ByPath({"": FactoredAxes(row=(1,), col=(0, 2))})
READ = {
    "query": (BalancedSplit(), (12, 3, 4), ((), (0,), (1, 2))),
    "output": (BalancedSplit(), (3, 4, 12), ((), (0, 1), (2,))),
    "convolution": (BalancedSplit(), (3, 3, 8, 16), ((), (0, 1, 2), (3,))),
    "cube": (LastTwoAxes(), (6, 6, 6), ((0,), (1,), (2,))),
    "scanned": (Stacked(BalancedSplit()), (5, 12, 3, 4), ((0,), (1,), (2, 3))),
    "scanned last": (Stacked(BalancedSplit(), axis=-1), (6, 8, 5), ((2,), (0,), (1,))),
    "einsum": (EINSUM, (3, 12, 4), ((), (1,), (0, 2))),
}


@pytest.mark.parametrize("name", READ)
def test_the_matrix_is_what_the_rule_says(name):
    rule, shape, groups = READ[name]
    x = matrix(*shape, dtype=np.float32)
    result = np.asarray(update({"w": x}, factoring=rule, consistent_rms=None)["w"])

    def matrices(a):
        sizes = [math.prod(shape[i] for i in group) for group in groups]
        return a.transpose(sum(groups, ())).reshape(sizes)

    for of_result, of_x in zip(matrices(result), matrices(x), strict=True):
        check(of_result, of_x)


@pytest.mark.parametrize(
    ("rule", "leaf"),
    [(BalancedSplit(), (4,)), (Stacked(BalancedSplit()), (3, 4)), (LastTwoAxes(), ())],
)
def test_what_is_no_matrix_is_refused_by_name(rule, leaf):
    tx, params = orthogonalize(factoring=rule), {"a": {"bias": jnp.ones(leaf)}}
    for refuse in tx.init, lambda params: tx.update(params, optax.EmptyState()):
        with pytest.raises(ValueError, match=r"leaf 'a/bias' of shape .* is no matrix"):
            refuse(params)


def test_empty_leaves_pass():
    chex.assert_shape(update({"w": jnp.ones((0, 3))})["w"], (0, 3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ns_coeffs": "quintic"}, "ns_coeffs must be 'standard' or 'polar_express'"),
        ({"ns_coeffs": (1.0, 2.0)}, "ns_coeffs must be .* triples"),
        ({"ns_coeffs": ((1.0, 2.0, 3.0), (1.0,))}, "ns_coeffs must be .* triples"),
        ({"ns_coeffs": np.zeros((0, 3))}, "ns_coeffs must be .* triples"),
        ({"ns_coeffs": (1.0, np.nan, 3.0)}, "ns_coeffs must be .* finite"),
        ({"consistent_rms": 0.0}, "consistent_rms must be > 0"),
        ({"dtype": "int8"}, "dtype must be a real floating dtype"),
    ],
)
def test_arguments_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        orthogonalize(**options)


JORDAN = (3.4445, -4.7750, 2.0315)  # optax 0.2.7 knows no names of coefficients.


@pytest.mark.parametrize("consistent_rms", [None, 0.2])
@pytest.mark.parametrize("ns_coeffs", ["standard", _PRESETS["polar_express"]])
def test_momentum_alone_gives_the_steps_of_optax_muon(ns_coeffs, consistent_rms):
    shapes = {"up": (8, 24), "down": (24, 8), "query": (12, 3, 4), "layers": (2, 12, 6)}
    axes = {"up": (0, 1), "down": (0, 1), "query": (0, (1, 2)), "layers": (1, 2)}
    numbers = {name: MuonDimensionNumbers(*some) for name, some in axes.items()}

    def make(seed):
        return {
            k: jnp.asarray(matrix(*s, seed=seed), jnp.float32)
            for k, s in shapes.items()
        }

    params = make(0)
    with jax.numpy_dtype_promotion("standard"):
        theirs = optax.contrib.muon(
            1e-2,
            ns_coeffs=JORDAN if ns_coeffs == "standard" else ns_coeffs,
            weight_decay=0.1,
            consistent_rms=consistent_rms,
            muon_weight_dimension_numbers=numbers,
        )
        ours = optax.chain(
            quantized_ema(0.95, nesterov=True, debias=True, mu_dtype="float32"),
            orthogonalize(
                factoring=ByMuonDimensionNumbers(numbers),
                ns_coeffs=ns_coeffs,
                consistent_rms=consistent_rms,
            ),
            optax.add_decayed_weights(0.1),
            optax.scale_by_learning_rate(1e-2),
        )
        state, their_state = ours.init(params), theirs.init(params)
        update, their_update = jax.jit(ours.update), jax.jit(theirs.update)
        for seed in range(4):
            updates, state = update(make(seed), state, params)
            expected, their_state = their_update(make(seed), their_state, params)
            chex.assert_trees_all_close(updates, expected, rtol=1e-4, atol=1e-6)

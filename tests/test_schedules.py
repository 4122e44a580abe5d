"""What each platform computes is the algorithm, in another order or form.

Every schedule runs here, on the CPU, beside the plain algorithm, and both beside the
formulas written once more in NumPy, in float64.
"""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from came_optax import (
    BalancedSplit,
    ByPath,
    LastTwoAxes,
    Stacked,
    quantized_ema,
    scale_by_came,
    scale_by_confidence,
    scale_by_factored_moment,
)
from came_optax import _algorithm as algorithm
from came_optax import _schedules as schedules
from came_optax._codes import Codes, decode
from came_optax._factored_axes import factored_axes
from came_optax._schedules import cpu, gpu, tpu

SCHEDULES = {"cpu": cpu.CPU, "gpu": gpu.GPU, "tpu": tpu.TPU}
STEPS = 4
SHAPES = {
    "matrix": (64, 66),
    "thin": (129, 1),
    "vector": (130,),
    "scalar": (),
    "stack": (3, 40, 48),
    "heads": (32, 4, 16),
}
OPTIONS = {
    "published": {},
    "steady": {
        "b2": 0.95,
        "eps2": 0.1,
        "bias_correction": True,
        "nesterov": True,
        "update_clipping_threshold": 1.0,
    },
    "clipped": {"update_clipping_threshold": 0.01, "clipping_threshold": 0.1},
    "unclipped": {"clipping_threshold": None, "bias_correction": True},
    "without momentum": {"b1": 0.0, "bias_correction": True},
    "nesterov": {"nesterov": True},
}
RULE = ByPath({"stack": Stacked(), "heads": BalancedSplit()})


def gradients(step, dtype):
    rng = np.random.default_rng(step)
    grads = {}
    for name, shape in SHAPES.items():
        g = rng.normal(size=shape) * np.exp(rng.normal(size=shape[-1:] or ()))
        if jnp.issubdtype(dtype, jnp.complexfloating):
            g = g + 1j * rng.normal(size=shape)
        grads[name] = jnp.asarray(np.asarray(g, dtype))
    return grads


@pytest.fixture(scope="module", autouse=True)
def fresh_traces():
    yield
    jax.clear_caches()


def run(tx, schedule, dtype):
    """Returns the updates and the state of each step by one schedule."""
    platforms = {} if schedule is None else {"cpu": schedule}
    with mock.patch.dict(schedules.BY_PLATFORM, platforms, clear=True):
        update = jax.jit(tx.update)
        state, steps = tx.init(gradients(0, dtype)), []
        for i in range(STEPS):
            updates, state = update(gradients(i, dtype), state)
            steps.append((updates, state))
    return steps


def far(x, y):
    """Returns the largest difference, in standard deviations of what is expected.

    Where all numbers are alike but for their rounding, it is relative to them.
    """
    x, y = np.asarray(x), np.asarray(y)
    assert x.shape == y.shape and x.dtype == y.dtype
    scale, largest = np.std(y), np.abs(y).max()
    scale = scale if scale > 1e-5 * largest else largest
    return float(np.abs(x - y).max() / max(scale, 1e-30))


def assert_close(found, expected, tolerance):
    for (path, x), y in zip(
        jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        assert far(x, y) <= tolerance, jax.tree_util.keystr(path)


def share_of_far(found, expected, tolerance):
    """Returns how many numbers differ by more standard deviations than that."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    differ = [
        np.abs(np.asarray(x, np.float64) - y).ravel()
        > tolerance * max(np.std(y), 1e-30)
        for x, y in ((x, np.asarray(y, np.float64)) for x, y in pairs)
        if y.size > 1
    ]
    return float(np.concatenate(differ).mean())


@functools.cache
def plain(options, mu_dtype):
    tx = scale_by_came(**OPTIONS[options], factoring=RULE, mu_dtype=mu_dtype)
    return run(tx, None, np.float32)


@pytest.mark.slow(but=3)
@pytest.mark.parametrize("mu_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("platform", SCHEDULES)
def test_values(platform, options, mu_dtype):
    tx = scale_by_came(**OPTIONS[options], factoring=RULE, mu_dtype=mu_dtype)
    found = run(tx, SCHEDULES[platform], np.float32)
    expected = plain(options, mu_dtype)
    if options == "without momentum":  # u − m is what rounding leaves.
        found, expected = ([u for u, _ in x] for x in (found, expected))
    if mu_dtype == "float32":
        assert_close(found, expected, 1e-5)
    else:  # A rounding error gives another bfloat16 in some thousandths of them.
        assert_close(found, expected, 2.0**-5)  # A unit in the last place.
        assert share_of_far(found, expected, 1e-5) < 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.complex64, np.float64, np.complex128])
@pytest.mark.parametrize("platform", SCHEDULES)
def test_complex_and_double(platform, dtype):
    with jax.enable_x64(True):
        for options in ("published", "steady"):
            tx = scale_by_came(**OPTIONS[options])
            found = run(tx, SCHEDULES[platform], dtype)
            expected = run(tx, None, dtype)
            assert_close(found, expected, 1e-5 if dtype == np.complex64 else 1e-13)


@pytest.mark.slow(but=2)
@pytest.mark.parametrize("mu_dtype", ["int8", "int4"])
@pytest.mark.parametrize("platform", SCHEDULES)
def test_codes(platform, mu_dtype):
    """The first step is exact; a rounding error may give another code afterwards."""
    tx = scale_by_came(mu_dtype=mu_dtype)
    found = run(tx, SCHEDULES[platform], np.float32)
    expected = run(tx, None, np.float32)
    assert_close(found[0][0], expected[0][0], 1e-5)
    one = 1.5 / {"int8": 127, "int4": 7}[mu_dtype]  # The largest step between codes.
    for (_, state), (_, plain_state) in zip(found, expected, strict=True):
        codes = {n: x for n, x in state.mu.items() if isinstance(x, Codes)}
        assert codes.keys() == {"matrix", "stack"}
        for name, x in codes.items():
            y, like = plain_state.mu[name], jnp.zeros(SHAPES[name])
            assert_close((x.row_scale, x.col_scale), (y.row_scale, y.col_scale), 0.02)
            axes = factored_axes(LastTwoAxes(), like)
            m, plain_m = decode(x, like, axes), decode(y, like, axes)
            difference = np.abs(np.asarray(m - plain_m))
            assert difference.max() <= 1.01 * one * np.abs(plain_m).max()
            assert np.mean(difference > 1e-4 * np.abs(plain_m).max()) < 1e-2


HALVES = [
    scale_by_factored_moment(),
    scale_by_confidence(nesterov=True),
    quantized_ema(0.9, mu_dtype="float32", nesterov=True),
]


@pytest.mark.parametrize("platform", SCHEDULES)
def test_each_half_and_momentum_alone(platform):
    for tx in HALVES:
        found = run(tx, SCHEDULES[platform], np.float32)
        assert_close(found, run(tx, None, np.float32), 1e-5)


def off(function):
    """Returns a function whose result is a thousandth too large."""
    return lambda *args: jax.tree.map(lambda x: 1.001 * x, function(*args))


WRONG = {
    "cpu": [
        (cpu, "mean_square", off(cpu.mean_square)),
        (cpu, "when_known", off(cpu.when_known)),
        (cpu, "recomputed", lambda function, *xs: lambda: off(function)(*xs)),
    ],
    "gpu": [(algorithm, "excess", off(algorithm.excess))],
    "tpu": [(jax.lax, "optimization_barrier", lambda x: 1.001 * x)],
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("platform", "term"),
    [(p, i) for p, terms in WRONG.items() for i in range(len(terms))],
)
def test_a_wrong_term_is_found(platform, term):
    module, name, function = WRONG[platform][term]
    tx = scale_by_came(clipping_threshold=0.5)
    with mock.patch.object(module, name, function):
        jax.clear_caches()
        found = run(tx, SCHEDULES[platform], np.float32)
    jax.clear_caches()
    expected = run(tx, None, np.float32)
    with pytest.raises(AssertionError):
        assert_close(found, expected, 1e-5)


def paper(grads, h, corrected):
    """Algorithm 2 of a matrix in NumPy, as the paper has it: its last update."""
    n, k = grads[0].shape
    r, c, big_r, big_c, m = np.zeros((n, 1)), np.zeros((1, k)), 0.0, 0.0, 0.0
    for t, g in enumerate(grads, 1):
        of_m, of_v, of_s = (1 - b**t if corrected else 1 for b in (h.b1, h.b2, h.b3))
        r = h.b2 * r + (1 - h.b2) * (g**2 + h.eps1).mean(1, keepdims=True)
        c = h.b2 * c + (1 - h.b2) * (g**2 + h.eps1).mean(0, keepdims=True)
        u = g / np.sqrt(r @ c / r.mean() / of_v)
        u = u / max(1, np.sqrt((u**2).mean()) / h.clip)
        m = h.b1 * m + (1 - h.b1) * u
        instability = (u - m) ** 2 + h.eps2
        big_r = h.b3 * big_r + (1 - h.b3) * instability.mean(1, keepdims=True)
        big_c = h.b3 * big_c + (1 - h.b3) * instability.mean(0, keepdims=True)
        update = m / of_m / np.sqrt(big_r @ big_c / big_r.mean() / of_s)
    return update


@pytest.mark.parametrize("corrected", [False, True])
def test_the_algorithm_is_the_papers(corrected):
    with jax.enable_x64(True):
        grads = [np.random.default_rng(i).normal(size=(6, 9)) for i in range(20)]
        tx = scale_by_came(bias_correction=corrected)
        state = tx.init(jnp.asarray(grads[0]))
        with mock.patch.dict(schedules.BY_PLATFORM, clear=True):
            for g in grads:
                update, state = jax.jit(tx.update)(jnp.asarray(g), state)
        expected = paper(grads, algorithm.Hyperparameters(), corrected)
        np.testing.assert_allclose(update, expected, rtol=1e-12)

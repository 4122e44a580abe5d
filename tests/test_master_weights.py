"""bfloat16 parameters whose weights are float32: bit for bit, or right on average."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from came_optax import (
    came,
    convert_state,
    master_weights,
    split_weights,
    state_memory,
    steady_came,
    with_master_weights,
)

NARROW = [jnp.bfloat16, jnp.float16]


def float32(bits):
    return np.asarray(bits, np.uint32).view(np.float32)


def bits_of(x):
    return np.asarray(x).view({2: np.uint16, 4: np.uint32}[x.dtype.itemsize])


def apply(params, updates):
    with jax.numpy_dtype_promotion("standard"):  # For bfloat16 and float32.
        return optax.apply_updates(params, updates)


def train(tx, params, gradients, steps, state=None):
    """Takes steps, the gradients of each of which depend on its number."""

    def step(carry, i):
        params, state = carry
        updates, state = tx.update(gradients(i), state, params)
        return (apply(params, updates), state), None

    run = jax.jit(functools.partial(jax.lax.scan, step))
    state = tx.init(params) if state is None else state
    return run((params, state), jnp.arange(steps))[0]


SHAPES = {"kernel": (32, 24), "bias": (24,), "scale": ()}
GRADIENTS = {
    name: np.random.default_rng(0).normal(size=(50, *shape)).astype(jnp.bfloat16)
    for name, shape in SHAPES.items()
}


def gradients(i, dtype=jnp.bfloat16):
    return {name: jnp.asarray(g, dtype)[i % len(g)] for name, g in GRADIENTS.items()}


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


def compiled_apart(tx):
    """Returns ``tx``, of which compilers make the same whatever is around it."""

    def zeros(*args):
        return jax.tree.map(jnp.zeros_like, jax.eval_shape(tx.update, *args))

    def update(grads, *args):
        false = jnp.isnan(jax.tree.leaves(grads)[0]).any()
        return jax.lax.cond(false, zeros, tx.update, grads, *args)

    return optax.GradientTransformation(tx.init, update)


EVERYWHERE = {"kernel": True, "bias": True, "scale": True}
CHAINS = {
    "sgd": optax.chain(
        optax.add_decayed_weights(0.1), optax.sgd(0.03, momentum=0.9, nesterov=True)
    ),
    "clipped steady_came": optax.chain(
        optax.clip_by_global_norm(1.0), steady_came(1e-3, weight_decay=0.1)
    ),
    "accumulated": optax.MultiSteps(optax.adamw(1e-3), 3).gradient_transformation(),
    "masked": optax.masked(optax.adam(1e-3), EVERYWHERE | {"bias": False}),
    "from small to huge": optax.scale_by_learning_rate(
        lambda count: jnp.exp2(30.0 * jnp.sin(0.1 * count))
    ),
}


@pytest.mark.slow(but=1)
@pytest.mark.parametrize("tx", CHAINS.values(), ids=CHAINS)
def test_after_1000_steps_32_bits_are_the_float32_run(tx):
    tx, start = compiled_apart(tx), gradients(0, jnp.float32)
    wide = functools.partial(gradients, dtype=jnp.float32)
    with jax.numpy_dtype_promotion("standard"):  # Some of optax needs it.
        expected, inner_state = train(tx, start, wide, 1000)
        params, remainder = split_weights(start, bits=32)
        tx = with_master_weights(tx, bits=32)
        state = tx.init(params)._replace(remainder=remainder)
        params, state = train(tx, params, gradients, 1000, state)
    chex.assert_trees_all_equal(master_weights(params, state), expected)
    chex.assert_trees_all_equal(state.inner_state, inner_state)
    nearest = optax.tree.cast(expected, jnp.bfloat16)
    chex.assert_trees_all_close(params, nearest, rtol=2**-7, atol=0)


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


@pytest.mark.parametrize("bits", [24, 16])
def test_no_step_is_lost(bits):
    """Weights of 1.0 and steps of 1e-5: a third of a unit of 24 bits."""
    params, steps = {"w": jnp.ones((32, 32), jnp.bfloat16)}, 300
    tx = with_master_weights(optax.sgd(1e-5), bits)

    def ones(_):
        return jax.tree.map(jnp.ones_like, params)

    moved = 1 - np.asarray(master_weights(*train(tx, params, ones, steps))["w"])
    np.testing.assert_allclose(moved.mean(), 1e-5 * steps, rtol=0.02)
    # Not a random walk, of which some element would be farther away.
    assert np.abs(moved - 1e-5 * steps).max() < 3 * 2.0 ** (8 - bits)


@pytest.mark.parametrize("bits", [16, 24, 32])
def test_what_is_not_moved_stays(bits):
    start = gradients(0)
    tx = with_master_weights(optax.sgd(1e-3), bits)

    def once(i):
        return jax.tree.map(lambda g: jnp.where(i == 0, g, 0), gradients(1))

    first, last = (train(tx, start, once, steps) for steps in (1, 100))
    chex.assert_trees_all_equal(first[0], last[0])
    chex.assert_trees_all_equal(first[1].remainder, last[1].remainder)


def test_elements_are_rounded_at_different_steps():
    params = {"w": jnp.ones((64, 64), jnp.bfloat16)}
    tx = with_master_weights(optax.sgd(2.0**-9), bits=16)
    updates, _ = tx.update(params, tx.init(params), params)
    down = np.asarray(updates["w"] != 0)
    assert 0.4 < down.mean() < 0.6  # A half of the 2⁻⁸ to the next.
    for axis in (0, 1):
        assert 0.1 < down.mean(axis).min() < down.mean(axis).max() < 0.9


def test_other_leaves_are_the_optimizers():
    wide = {"w": jnp.ones((3, 4)), "z": jnp.ones(3, jnp.complex64)}
    params = wide | {"half": jnp.ones(3, jnp.bfloat16)}
    tx = optax.sgd(0.1, momentum=0.9)
    wrapped = with_master_weights(tx, bits=32)
    state = wrapped.init(params)
    assert {r.dtype for r in state.remainder.values()} == {jnp.dtype("int16")}
    shapes = jax.tree.map(jnp.shape, state.remainder)
    assert shapes == {"w": (1,), "z": (1,), "half": (3,)}
    updates, state = wrapped.update(params, state, params)
    expected, _ = tx.update(params, tx.init(params), params)
    for name, p in wide.items():
        assert updates[name].dtype == p.dtype
        np.testing.assert_array_equal(updates[name], expected[name])
        assert master_weights(params, state)[name] is p


AROUND = {
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 4).gradient_transformation(),
    "masked": lambda tx: optax.masked(tx, EVERYWHERE),
    "chain": lambda tx: optax.chain(optax.clip(10.0), tx),
    "injected": lambda tx: optax.inject_hyperparams(
        lambda b1: optax.chain(optax.clip(b1), tx)
    )(b1=10.0),
}
INSIDE = AROUND | {"apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3)}


@pytest.mark.slow(but=4)
@pytest.mark.parametrize(
    ("wrap", "inside"),
    [(name, False) for name in AROUND] + [(name, True) for name in INSIDE],
)
def test_wrappers_around_and_inside(wrap, inside):
    if (wrap, inside) == ("MultiSteps", False) and optax.__version__ == "0.2.7":
        pytest.skip("optax 0.2.7's MultiSteps changes the dtype of what it adds up")
    start = gradients(0)

    def repeated(i, dtype=jnp.bfloat16):
        return gradients(i // 4, dtype)

    tx, master = optax.adam(1e-3), functools.partial(with_master_weights, bits=32)
    with jax.numpy_dtype_promotion("standard"):  # Some of optax needs it.
        wrapped = master(INSIDE[wrap](tx)) if inside else INSIDE[wrap](master(tx))
        params, state = train(wrapped, start, repeated, 20)
        wide = optax.tree.cast(start, jnp.float32)
        in_float32 = functools.partial(repeated, dtype=jnp.float32)
        expected, _ = train(INSIDE[wrap](tx), wide, in_float32, 20)
    assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    weights = master_weights(params, state)
    chex.assert_trees_all_close(weights, expected, rtol=1e-5, atol=1e-7)
    moved = jax.tree.map(lambda w, p: jnp.abs(w - p).max(), expected, wide)
    assert min(jax.tree.leaves(moved)) > 1e-3


def test_gradients_accumulated_inside_are_in_float32():
    """256 times 1 and once 1: in bfloat16 the last is lost."""
    ones = {"w": jnp.ones(1, jnp.bfloat16)}
    sums = optax.MultiSteps(optax.sgd(1.0), 257, use_grad_mean=False)
    tx = with_master_weights(sums.gradient_transformation(), bits=32)
    with jax.numpy_dtype_promotion("standard"):
        params, state = train(tx, ones, lambda _: ones, 257)
    np.testing.assert_array_equal(master_weights(params, state)["w"], 1.0 - 257.0)


def test_a_job_moves_to_another_optimizer_with_its_weights():
    params = {"w": jnp.full((64, 64), 0.3, jnp.bfloat16)}
    old, new = (with_master_weights(tx) for tx in (optax.adamw(1e-3), came(1e-3)))
    with jax.numpy_dtype_promotion("standard"):  # optax.adamw needs it.
        updates, state = old.update(params, old.init(params), params)
    params = apply(params, updates)
    moved = convert_state(state, params, old=old, new=new)
    assert jnp.any(state.remainder["w"] != 0)
    chex.assert_trees_all_equal(moved.remainder, state.remainder)
    assert jnp.all(optax.tree.get(moved, "mu")["w"] > 0)
    for bits in (16, 32):
        other = with_master_weights(came(1e-3), bits)
        with pytest.raises(ValueError, match=r"remainder/w.* in new, and int8"):
            convert_state(state, params, old=old, new=other)


def test_bytes():
    params = {"kernel": jax.ShapeDtypeStruct((256, 256), jnp.bfloat16)}
    bytes_ = {
        bits: state_memory(with_master_weights(optax.sgd(1.0), bits), params).total
        for bits in (16, 24, 32)
    }
    assert bytes_ == {16: 4 + 1, 24: 4 + 256**2, 32: 4 + 2 * 256**2}


def test_errors_name_what_is_wrong():
    def tx(bits=24):
        return with_master_weights(optax.sgd(0.1), bits)

    params = {"w": jnp.ones(3, jnp.bfloat16)}
    state, cast = tx().init(params), optax.tree.cast(params, jnp.float32)
    with pytest.raises(ValueError, match="bits must be 16, 24 or 32, got 8"):
        tx(bits=8)
    with pytest.raises(ValueError, match=r"dtype must be bfloat16 or .*, got 'int8'"):
        split_weights(params, dtype="int8")
    with pytest.raises(ValueError, match="not passing `params`"):
        tx().update(params, state)
    with pytest.raises(TypeError, match="with_master_weights must be a MasterWeights"):
        tx().update(params, state.inner_state, params)
    with pytest.raises(
        TypeError, match=r"remainder of leaf 'w' has dtype int8.* int16"
    ):
        tx(bits=32).update(params, state, params)
    with pytest.raises(TypeError, match=r"'w' .*float32.*optax.apply_updates"):
        tx().update(params, state, cast)
    with pytest.raises(KeyError, match="with_master_weights"):
        master_weights(params, optax.EmptyState())

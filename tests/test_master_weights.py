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
    "guarded": optax.apply_if_finite(optax.adam(1e-3), 3),
    "from small to huge": optax.scale_by_learning_rate(
        lambda count: jnp.exp2(30.0 * jnp.sin(0.1 * count))
    ),
}


@pytest.mark.slow
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
    "chain": lambda tx: optax.chain(optax.clip(10.0), tx),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 4).gradient_transformation(),
    "masked": lambda tx: optax.masked(tx, EVERYWHERE),
    "injected": lambda tx: optax.inject_hyperparams(
        lambda b1: optax.chain(optax.clip(b1), tx)
    )(b1=10.0),
}


@pytest.mark.slow(but=1)
@pytest.mark.parametrize("name", AROUND)
def test_wrappers_around(name):
    if name == "MultiSteps" and optax.__version__ == "0.2.7":
        pytest.skip("optax 0.2.7's MultiSteps changes the dtype of what it adds up")
    wrap, start, tx = AROUND[name], gradients(0), optax.adam(1e-3)

    def repeated(i, dtype=jnp.bfloat16):
        return gradients(i // 4, dtype)

    with jax.numpy_dtype_promotion("standard"):  # Some of optax needs it.
        params, state = train(wrap(with_master_weights(tx, 32)), start, repeated, 20)
        wide = optax.tree.cast(start, jnp.float32)
        in_float32 = functools.partial(repeated, dtype=jnp.float32)
        expected, _ = train(wrap(tx), wide, in_float32, 20)
    assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    weights = master_weights(params, state)
    chex.assert_trees_all_close(weights, expected, rtol=1e-5, atol=1e-7)
    moved = jax.tree.map(lambda w, p: jnp.abs(w - p).max(), expected, wide)
    assert min(jax.tree.leaves(moved)) > 1e-3


def test_weights_are_found_in_parts_of_a_tree():
    params = {name: jnp.full(3, 0.3, jnp.bfloat16) for name in ("a", "b", "c")}
    one, other = (with_master_weights(optax.sgd(r), 32) for r in (1e-3, 2e-3))
    labels = {"a": "one", "b": "other", "c": "none"}
    tx = optax.partition({"one": one, "other": other, "none": optax.sgd(1.0)}, labels)
    _, state = tx.update(params, tx.init(params), params)
    weights = master_weights(params, state)
    start = float(params["a"][0])
    assert weights["c"].dtype == jnp.bfloat16
    np.testing.assert_allclose(weights["a"], start, rtol=5e-3)
    np.testing.assert_allclose(weights["a"] - start, start * -1e-3, rtol=1e-2)
    np.testing.assert_allclose(weights["b"] - start, start * -2e-3, rtol=1e-2)
    masked = optax.masked(one, {"a": True, "b": False, "c": False})
    assert master_weights(params, masked.init(params))["a"].dtype == jnp.float32
    with pytest.raises(KeyError, match="several remainders of 'a'"):
        master_weights(params, (one.init(params), other.init(params)))
    with pytest.raises(KeyError, match="no state of with_master_weights"):
        master_weights(params, optax.sgd(1.0).init(params))


@pytest.mark.slow
def test_gradients_accumulated_inside_are_in_float32():
    """256 times 1 and once 1: in bfloat16 the last is lost."""
    ones = {"w": jnp.ones(1, jnp.bfloat16)}
    sums = optax.MultiSteps(optax.sgd(1.0), 257, use_grad_mean=False)
    tx = with_master_weights(sums.gradient_transformation(), bits=32)
    with jax.numpy_dtype_promotion("standard"):
        params, state = train(tx, ones, lambda _: ones, 257)
    np.testing.assert_array_equal(master_weights(params, state)["w"], 1.0 - 257.0)


@pytest.mark.slow
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
    for bits in 24.0, [24], True:
        with pytest.raises(ValueError, match="bits must be 16, 24 or 32"):
            tx(bits)
    with pytest.raises(TypeError, match=r"leaf 'w' is 1\.0, not an array"):
        tx().init({"w": 1.0})
    with pytest.raises(TypeError, match=r"leaf 'w' is 1\.0, not an array"):
        split_weights({"w": 1.0})
    with pytest.raises(ValueError, match=r"'w' has shape \(3,\) in the params and \("):
        tx().update({"w": params["w"][:1]}, state, params)
    other = {"v": params["w"]}
    with pytest.raises(ValueError, match="'v' is in the params but not in the state"):
        tx().update(other, state, other)


def test_dtypes_may_be_named():
    weights = {"w": jnp.full(3, 0.3)}
    for params, remainder in (
        split_weights(weights, dtype=dtype) for dtype in (jnp.float16, "float16")
    ):
        assert params["w"].dtype == jnp.float16
        assert remainder["w"].shape == (3,)

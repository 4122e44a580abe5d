"""Momentum stored in 16, 8 and 4 bits."""

import functools
import math
from typing import Any

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from came_optax import (
    BalancedSplit,
    Codes,
    FactoredAxes,
    LargestTwoAxes,
    LastTwoAxes,
    Stacked,
    _codes,
    came,
    scale_by_came,
    scale_by_confidence,
    steady_came,
)

# The largest distance between neighbouring codes, which is 3/2 of the mean one.
LARGEST_ERROR = {"int8": 1.5 / 127, "int4": 1.5 / 7}
BITS = {"int8": 8, "int4": 4}
EXAMPLES = hypothesis.settings.default.max_examples
quantized = pytest.mark.parametrize("mu_dtype", LARGEST_ERROR)

RULES = [LastTwoAxes(), BalancedSplit(), LargestTwoAxes(8), Stacked(LastTwoAxes())]
SHAPES = [
    (4096,),
    (5001,),
    (64, 64),
    (67, 65),
    (1031, 6),
    (3, 37, 41),
    (3, 5, 17, 19),
    (2, 2, 32, 33),
]
# Codes and scales together would take more than the array.
THIN = [(1, 4097), (4097, 1), (4, 1, 1024), (7, 7, 1, 96)]


def normal(shape: Any, dtype: Any = jnp.float32, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def matrix_axes(ndim: int) -> FactoredAxes:
    return FactoredAxes((ndim - 2,), (ndim - 1,)) if ndim > 1 else FactoredAxes()


@functools.partial(jax.jit, static_argnums=1)
def round_trip(m: jax.Array, mu_dtype: str, step: int = 1) -> Any:
    """Returns what the next step reads of momentum ``m``."""
    axes = matrix_axes(m.ndim)
    step, largest = jnp.int32(step), _codes.largest
    codes = _codes.encode(lambda: m, axes, BITS[mu_dtype], step, largest)
    return _codes.decode(codes, m, axes)


def largest(m: Any) -> Any:
    """The smaller of the largest magnitudes in each element's row and column."""
    m = np.abs(m)
    row = m.max(-1, keepdims=True)
    return row if m.ndim == 1 else np.minimum(row, m.max(-2, keepdims=True))


@quantized
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_is_a_step_of_the_row_or_column(shape: Any, mu_dtype: str) -> None:
    sizes = 10 ** normal(shape[-1:], seed=1)
    m = np.asarray(normal(shape)) * np.asarray(sizes)
    error = np.abs(round_trip(jnp.asarray(m), mu_dtype) - m)
    assert (error <= 1.001 * LARGEST_ERROR[mu_dtype] * largest(m)).all()


@quantized
def test_what_is_extreme_in_its_row_and_column_is_kept(mu_dtype: str) -> None:
    m = jnp.diag(normal((64,)))
    for step in range(20):
        chex.assert_trees_all_close(round_trip(m, mu_dtype, step), m, rtol=3e-7)


@quantized
def test_small_values_keep_finer_codes(mu_dtype: str) -> None:
    m = jnp.linspace(-1, 1, 8193)
    error = jnp.abs(round_trip(m, mu_dtype) - m)
    assert error.max() == pytest.approx(LARGEST_ERROR[mu_dtype], rel=0.15)
    assert error[jnp.abs(m) < 0.1].max() < 0.6 * error.max()


@quantized
def test_the_mean_over_steps_is_exact(mu_dtype: str) -> None:
    """To a fortieth of the distance of codes; to the nearest it would be a fourth."""
    m = normal((64, 64))
    steps = jnp.arange(512)
    mean = jnp.mean(jax.vmap(lambda i: round_trip(m, mu_dtype, i))(steps), 0)
    error = jnp.abs(mean - m) / jnp.asarray(largest(m))
    assert error.max() <= LARGEST_ERROR[mu_dtype] / 40


@quantized
def test_the_mean_over_steps_is_exact_relative_to_small_values_too(
    mu_dtype: str,
) -> None:
    """Rounded evenly between codes, not levels, they would be up to 14 % too large."""
    m = jnp.concatenate([jnp.ones(1), 10.0 ** jnp.linspace(-2.7, 0, 63)])
    m = m * jnp.where(jnp.arange(64) % 2 == 0, 1, -1)
    steps = jnp.arange(8192)
    mean = jnp.mean(jax.vmap(lambda i: round_trip(m, mu_dtype, i))(steps), 0)
    np.testing.assert_allclose(mean, m, rtol=0.01)


def left_after(mu_dtype: str, steps: int, b1: float = 0.9, **gradient: float) -> float:
    """How far pruned elements still move, relative to those that live on."""
    tx = scale_by_came(b1=b1, mu_dtype=mu_dtype, bias_correction=True)
    pruned = jnp.asarray(np.random.default_rng(0).random((64, 96)) < 0.3)
    noise, constant = gradient["noise"], gradient["constant"]

    def step(state: Any, t: jax.Array) -> Any:
        key = jax.random.fold_in(jax.random.key(0), t)
        g = constant * jnp.sign(normal((64, 96))) + noise * jax.random.normal(
            key, (64, 96)
        )
        updates, state = tx.update(jnp.where(pruned & (t >= 100), 0.0, g), state)
        return state, (updates, optax.tree.get(state, "mu"))

    @jax.jit
    def run() -> Any:
        state = tx.init(jnp.zeros((64, 96)))
        return jax.lax.scan(step, state, jnp.arange(100 + steps, dtype=jnp.int32))[1][0]

    last = jnp.abs(run()[-1])
    return float(jnp.mean(last, where=pruned) / jnp.mean(last, where=~pruned))


@pytest.mark.parametrize(
    "gradient", [{"noise": 1.0, "constant": 0.0}, {"noise": 0.0, "constant": 1.0}]
)
@quantized
def test_momentum_of_zero_gradients_decays(mu_dtype: str, gradient: Any) -> None:
    """In nearest codes of 4 bits 22 % of it would stay, or 64 % without noise."""
    assert left_after(mu_dtype, 200, **gradient) <= 0.02


@pytest.mark.slow(but=1)
@quantized
def test_momentum_decays_with_a_slow_rate_too(mu_dtype: str) -> None:
    gradient = {"noise": 1.0, "constant": 0.0}
    exact = left_after("float32", 100, b1=0.99, **gradient)
    assert left_after(mu_dtype, 100, b1=0.99, **gradient) < 1.5 * exact


@pytest.mark.parametrize("b1, forgets", [(0.9, True), (0.996, True), (0.998, False)])
def test_the_slowest_rate_at_which_bfloat16_forgets(b1: float, forgets: bool) -> None:
    """The docstring of ``mu_dtype`` says so; float32 and codes always forget."""
    tx = scale_by_came(b1=b1, mu_dtype="bfloat16")
    g = normal((8, 8))

    def step(state: Any, _: None) -> Any:
        return tx.update(jnp.zeros_like(g), state)[1], None

    @jax.jit
    def run() -> Any:
        _, state = tx.update(g, tx.init(g))
        return state.mu, jax.lax.scan(step, state, None, 3000)[0].mu

    before, after = run()
    left = jnp.abs(after.astype("float32") / before.astype("float32"))
    assert (left.max() < 1e-4) if forgets else (left.min() > 0.5)


@quantized
@pytest.mark.parametrize("size", [2.0**-100, 2.0**-60, 2.0**60, 2.0**126])
def test_tiny_and_huge_values(size: float, mu_dtype: str) -> None:
    m = normal((64, 64))
    m = m / jnp.abs(m).max()
    chex.assert_trees_all_equal(
        round_trip(m * size, mu_dtype) / size, round_trip(m, mu_dtype)
    )


@quantized
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_bad_gradients_are_not_forgotten(bad: float, mu_dtype: str) -> None:
    grads = {"x": normal((64, 64))}
    tx = came(1e-3, mu_dtype=mu_dtype)
    update = jax.jit(tx.update)
    _, state = update({"x": grads["x"].at[3, 5].set(bad)}, tx.init(grads), grads)
    updates, _ = update(grads, state, grads)
    assert not jnp.isfinite(updates["x"]).all()


@quantized
def test_zero_rows_columns_and_leaves_stay_zero(mu_dtype: str) -> None:
    m = normal((64, 64)).at[7].set(0).at[:, 9].set(0)
    read = round_trip(m, mu_dtype)
    assert not read[7].any() and not read[:, 9].any()
    assert read.any()
    chex.assert_trees_all_equal(round_trip(0 * m, mu_dtype), 0 * m)


@hypothesis.settings(max_examples=EXAMPLES // 2)
@hypothesis.given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    mu_dtype=st.sampled_from(list(LARGEST_ERROR)),
    seed=st.integers(0, 100),
)
def test_any_shape(shape: list[int], mu_dtype: str, seed: int) -> None:
    shape = [*shape, -(-4096 // math.prod(shape))]
    m = np.asarray(normal(shape, seed=seed))
    error = np.abs(round_trip(m, mu_dtype) - m)
    assert (error <= 1.001 * LARGEST_ERROR[mu_dtype] * largest(m)).all()


@pytest.mark.parametrize(
    ("mu_dtype", "dtype", "shape", "bytes_each"),
    [
        ("float32", jnp.float32, (64, 64), 4),
        ("bfloat16", jnp.float32, (64, 64), 2),
        ("int8", jnp.float32, (64, 64), 1),
        (jnp.dtype("int8"), jnp.float32, (64, 64), 1),
        (jnp.int8, jnp.float32, (64, 64), 1),
        (jnp.bfloat16, jnp.float32, (64, 64), 2),
        (None, jnp.float32, (64, 64), 4),
        (jnp.float32, jnp.bfloat16, (64, 64), 4),
        ("int8", jnp.bfloat16, (64, 64), 1),
        ("int8", jnp.float16, (5000,), 1),
        ("int8", jnp.float32, (64, 63), 4),
        ("int8", jnp.complex64, (64, 64), 8),
        ("int4", jnp.float32, (64, 64), 0.5),
        ("int4", jnp.float32, (65, 64), 0.5),
        ("int4", jnp.float32, (8, 24, 32), 0.5),
        (jnp.int4, jnp.float32, (64, 64), 0.5),
        ("int4", jnp.float32, (1031, 6), 520 / 1031),  # Rows padded to 65 × 16.
        ("int4", jnp.float16, (5000,), 0.5),
        ("int4", jnp.float32, (64, 63), 4),
        ("int4", jnp.complex64, (64, 64), 8),
    ],
)
def test_bytes(mu_dtype: str, dtype: Any, shape: Any, bytes_each: float) -> None:
    params = {"x": jnp.ones(shape, dtype)}
    state = came(1e-3, mu_dtype=mu_dtype).init(params)
    mu = optax.tree.get(state, "mu")["x"]
    stored = mu.values if isinstance(mu, Codes) else mu
    assert stored.nbytes == bytes_each * params["x"].size


@pytest.mark.slow(but=48)
@pytest.mark.parametrize("mu_dtype", [None, "bfloat16", "int8", "int4"])
@pytest.mark.parametrize(
    "rule",
    [LastTwoAxes(4), BalancedSplit(4), LargestTwoAxes(8), Stacked(LastTwoAxes(4))],
    ids=lambda rule: type(rule).__name__,
)
@pytest.mark.parametrize(
    "shape",
    [*SHAPES, *THIN, (64, 32, 1, 1), (512, 2), (2, 768), (4096, 1), (8, 4), (1, 1)],
    ids=str,
)
def test_no_state_is_larger_than_adams(shape: Any, rule: Any, mu_dtype: Any) -> None:
    """But for what stands for arrays that the leaf lacks, of 4 bytes each.

    Two statistics of rows and two of columns are no more than one of the whole where
    there are four of each.
    """
    p = jax.ShapeDtypeStruct(shape, jnp.float32)

    def size(mu_dtype: Any) -> int:
        tx = scale_by_came(factoring=rule, mu_dtype=mu_dtype)
        arrays = jax.tree.leaves(jax.eval_shape(tx.init, p))
        return sum(
            x.size * x.dtype.itemsize for x in arrays if x.shape not in ((), (1,))
        )

    assert size(mu_dtype) <= 8 * p.size
    assert size(mu_dtype) <= size(None)


@pytest.mark.slow(but=7)
@pytest.mark.parametrize("mu_dtype", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_state_keeps_its_types(dtype: Any, rule: Any, mu_dtype: str) -> None:
    params = {str(shape): jnp.ones(shape, dtype) for shape in SHAPES + THIN}
    tx = came(1e-3, mu_dtype=mu_dtype, factoring=rule)
    state = jax.eval_shape(tx.init, params)
    updates, new_state = jax.eval_shape(tx.update, params, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    assert all(x.size for x in jax.tree.leaves(state))


@quantized
def test_only_what_is_stored_is_rounded(mu_dtype: str) -> None:
    params = {"kernel": normal((64, 65))}

    @functools.partial(jax.jit, static_argnums=1)
    def two_updates(grads: Any, mu_dtype: str) -> Any:
        tx = came(1e-3, mu_dtype=mu_dtype)
        first, state = tx.update(grads, tx.init(grads), grads)
        return first, tx.update(grads, state, grads)[0]

    first, second = two_updates(params, mu_dtype)
    exact_first, exact_second = two_updates(params, "float32")
    chex.assert_trees_all_close(first, exact_first, rtol=1e-5)
    difference = second["kernel"] - exact_second["kernel"]
    assert jnp.abs(difference).max() > 1e-4 * jnp.abs(second["kernel"]).max()


@quantized
def test_a_stack_is_its_layers(mu_dtype: str) -> None:
    layers = [{"kernel": normal((64, 64), seed=i) * 10.0**i} for i in range(3)]
    stack = jax.tree.map(lambda *x: jnp.stack(x), *layers)

    @functools.partial(jax.jit, static_argnums=1)
    def two_updates(grads: Any, factoring: Any) -> Any:
        tx = scale_by_confidence(mu_dtype=mu_dtype, factoring=factoring)
        _, state = tx.update(grads, tx.init(grads))
        return tx.update(grads, state)[0]

    updates = two_updates(stack, Stacked())
    for i, layer in enumerate(layers):
        expected = two_updates(layer, LastTwoAxes())
        chex.assert_trees_all_close(updates["kernel"][i], expected["kernel"], rtol=1e-5)


def trained(tx: Any, steps: int = 4, jit: bool = True) -> Any:
    """Returns parameters and state after some steps, one jitted call each."""
    params = {"kernel": normal((64, 66)), "bias": normal((66,))}
    state = tx.init(params)

    def step(params: Any, state: Any, i: jax.Array) -> Any:
        grads = jax.tree.map(lambda p: jnp.sin(p + i), params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step, donate_argnums=(0, 1)) if jit else step
    for i in range(steps):
        params, state = step(params, state, jnp.float32(i))
    return params, state


@pytest.mark.slow(but=1)
@quantized
def test_scan_and_vmap(mu_dtype: str) -> None:
    tx = came(1e-2, mu_dtype=mu_dtype)
    grads = normal((4, 2, 64, 66))

    def run(grads: Any) -> Any:
        params = jnp.zeros((64, 66))

        def step(carry: Any, g: Any) -> Any:
            params, state = carry
            updates, state = tx.update(g, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), grads)[0]

    mapped = jax.jit(jax.vmap(run, in_axes=1))(grads)
    for i in range(2):
        alone = jax.jit(run)(grads[:, i])
        one = jax.tree.map(lambda x, i=i: x[i], mapped)
        chex.assert_trees_all_close(one[0], alone[0], atol=1e-4)
        chex.assert_trees_all_equal_dtypes(one[1], alone[1])


@pytest.mark.slow  # And one code may differ where XLA does not optimise.
@quantized
def test_inside_multi_steps_and_inject_hyperparams(mu_dtype: str) -> None:
    plain, _ = trained(came(1e-2, mu_dtype=mu_dtype))
    injected, state = trained(optax.inject_hyperparams(came)(1e-2, mu_dtype=mu_dtype))
    chex.assert_trees_all_close(injected, plain, atol=1e-5)
    assert isinstance(optax.tree.get(state.inner_state, "mu")["kernel"], Codes)
    with jax.numpy_dtype_promotion("standard"):  # MultiSteps needs it.
        accumulated, _ = trained(optax.MultiSteps(came(1e-2, mu_dtype=mu_dtype), 1))
    chex.assert_trees_all_close(accumulated, plain, atol=1e-5)


@quantized
def test_orbax_round_trip_is_bit_for_bit(mu_dtype: str, tmp_path: Any) -> None:
    tx = came(1e-2, mu_dtype=mu_dtype)
    params, state = trained(tx)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        abstract = jax.eval_shape(tx.init, params)
        restored = checkpointer.restore(tmp_path / "state", abstract)
    chex.assert_trees_all_equal(restored, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(restored, state)


@pytest.mark.skipif(
    jax.__version_info__ < (0, 10),
    reason="the XLA of jax 0.8.1 takes 48 KiB more than the bound",
)
@quantized
def test_temporaries_of_codes_are_one_leaf(mu_dtype: str) -> None:
    """What passes share of coded momentum is one array, for one leaf after the other.

    In bfloat16 it is that of two leaves; in float32 momentum itself is the place.
    """
    params = {str(i): jax.ShapeDtypeStruct((256, 512), jnp.float32) for i in range(6)}

    def temporaries(mu_dtype: str) -> int:
        tx = steady_came(1e-3, mu_dtype=mu_dtype)

        def step(params: Any, state: Any, grads: Any) -> Any:
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        state = jax.eval_shape(tx.init, params)
        compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params)
        return compiled.compile().memory_analysis().temp_size_in_bytes

    leaf = 4 * 256 * 512
    assert temporaries("float32") < leaf / 4
    assert temporaries(mu_dtype) <= temporaries("float32") + 1.1 * leaf
    assert temporaries("bfloat16") <= temporaries("float32") + 2.1 * leaf


@pytest.mark.parametrize("mu_dtype", ["int16", "float16", "int9", 8, "uint8"])
def test_unknown_dtypes_are_named(mu_dtype: Any) -> None:
    with pytest.raises(ValueError, match=rf"mu_dtype must be one of .*{mu_dtype}"):
        came(1e-3, mu_dtype=mu_dtype)


@pytest.mark.parametrize(
    ("made_with", "error"),
    [
        ("float32", "mu of leaf 'x' has dtype float32.*must be Codes"),
        ("int4", "mu.values of leaf 'x' has dtype uint8"),
    ],
)
def test_states_of_another_dtype_are_refused(made_with: str, error: str) -> None:
    params = {"x": jnp.ones((64, 64))}
    state = scale_by_confidence(mu_dtype=made_with).init(params)
    with pytest.raises(TypeError, match=error):
        scale_by_confidence(mu_dtype="int8").update(params, state)


def test_scales_of_another_shape_are_refused() -> None:
    params = {"x": jnp.ones((64, 64))}
    tx = scale_by_confidence(mu_dtype="int8")
    state = tx.init(params)
    state = state._replace(mu={"x": state.mu["x"]._replace(row_scale=jnp.ones((65,)))})
    with pytest.raises(ValueError, match=r"mu.row_scale of leaf 'x' has shape \(65,\)"):
        tx.update(params, state)


def test_codes_for_an_array_are_refused() -> None:
    params = {"x": jnp.ones((64, 64))}
    state = scale_by_confidence(mu_dtype="int8").init(params)
    with pytest.raises(TypeError, match=r"mu of leaf 'x' is codes.*must be an array"):
        scale_by_confidence().update(params, state)

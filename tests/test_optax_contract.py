"""What optax asks of its own optimizers: types, compilation and odd trees."""

import itertools
import logging
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import came_optax
from came_optax import BalancedSplit

OPTIMIZERS: dict[str, optax.GradientTransformationExtraArgs] = {
    "came": came_optax.came(1e-3),
    "came with options": came_optax.came(
        optax.linear_schedule(1e-2, 1e-3, 10),
        weight_decay=0.1,
        factoring=BalancedSplit(),
        mu_dtype="bfloat16",
        bias_correction=True,
        update_clipping_threshold=1.0,
    ),
    "scale_by_came": came_optax.scale_by_came(),
    "scale_by_factored_moment": came_optax.scale_by_factored_moment(),
    "scale_by_confidence": came_optax.scale_by_confidence(),
}
NARROW = [jnp.float16, jnp.bfloat16, jnp.float32]
DTYPES = [*NARROW, jnp.float64, jnp.complex64, jnp.complex128]

every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64


def make_params(dtype: Any = jnp.float32) -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    shapes = {"bias": (3,), "kernel": (2, 5, 3), "scale": ()}
    return {
        name: jnp.asarray(rng.normal(size=shape).astype(dtype))
        for name, shape in shapes.items()
    }


def types(tree: Any) -> Any:
    """Returns the tree of shapes, dtypes, weak types and shardings."""
    return jax.tree.map(jax.typeof, tree)


@every_optimizer
def test_the_kernel_is_factored(name: str) -> None:
    state = OPTIMIZERS[name].init(make_params())
    statistic = "s_col" if name == "scale_by_confidence" else "v_col"
    assert optax.tree.get(state, statistic)["kernel"].size > 1


@every_optimizer
def test_second_call_compiles_nothing_whatever_extra_args(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    tx = OPTIMIZERS[name]

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        updates, state = tx.update(params, state, params, value=1.0, unknown_to_came=2)
        return optax.apply_updates(params, updates), state

    params = make_params()
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        params, state = step(params, tx.init(params))
        assert "Finished XLA compilation of jit(step)" in caplog.text
        caplog.clear()
        step(params, state)
    assert "compilation" not in caplog.text


@pytest.mark.slow(but=2)
@every_optimizer
def test_types_are_stable_under_cond_and_scan(name: str) -> None:
    with x64(True):
        tx, params = OPTIMIZERS[name], [make_params(dtype) for dtype in DTYPES]
        state = jax.jit(tx.init)(params)

        def step(carry: Any, skip: jax.Array) -> tuple[Any, None]:
            params, state = carry
            updates, state = jax.lax.cond(
                skip,
                lambda: (optax.tree.zeros_like(params), state),
                lambda: tx.update(params, state, params),
            )
            chex.assert_trees_all_equal_dtypes(updates, params)
            return (optax.apply_updates(params, updates), state), None

        skips = jnp.array([False, True, False])
        carry, _ = jax.jit(lambda carry: jax.lax.scan(step, carry, skips))(
            (params, state)
        )
        assert types(carry) == types((params, state))
        chex.assert_tree_all_finite(carry)


def test_updates_have_the_dtype_of_the_params() -> None:
    # The float32 arrays that inject_hyperparams makes must not promote the updates.
    tx = optax.inject_hyperparams(came_optax.came, hyperparam_dtype=jnp.float32)(
        1e-2, weight_decay=0.1
    )
    dtypes = list(itertools.product(NARROW, NARROW))
    params = [jnp.ones((3, 2), params_dtype) for params_dtype, _ in dtypes]
    grads = [jnp.ones((3, 2), grads_dtype) for _, grads_dtype in dtypes]
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
    chex.assert_trees_all_equal_dtypes(updates, params)
    without_params = came_optax.came(1e-2)
    updates, _ = jax.jit(without_params.update)(grads, without_params.init(params))
    chex.assert_trees_all_equal_dtypes(updates, grads)
    for statistic in ("mu", "v_row", "v_col", "s_row", "s_col"):
        for leaf in optax.tree.get(state, statistic):
            assert leaf.dtype == jnp.float32, statistic


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.complex128])
def test_numpy_params_are_jax_arrays_of_the_same_values(dtype: Any) -> None:
    # Outside x64, jax takes NumPy's 64-bit arrays for 32-bit ones; so do we, silently.
    tx = came_optax.came(1e-2, weight_decay=0.1)
    numpy = {"kernel": np.ones((3, 2), dtype), "bias": np.ones(2, dtype)}
    jaxed = jax.tree.map(jnp.asarray, numpy)
    update = jax.jit(tx.update)
    chex.assert_trees_all_equal(
        update(numpy, tx.init(numpy), numpy), update(jaxed, tx.init(jaxed), jaxed)
    )


@every_optimizer
def test_init_needs_only_shapes(name: str) -> None:
    tx, params = OPTIMIZERS[name], make_params(jnp.bfloat16)
    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
    chex.assert_trees_all_equal(tx.init(shapes), tx.init(params))
    abstract = jax.eval_shape(tx.init, shapes)
    chex.assert_trees_all_equal_shapes_and_dtypes(abstract, tx.init(params))


@pytest.mark.slow(but=2)
@every_optimizer
def test_vmap_over_an_ensemble_equals_separate_runs(name: str) -> None:
    tx = OPTIMIZERS[name]

    def step(carry: Any, _: None) -> tuple[Any, None]:
        params, state = carry
        updates, state = tx.update(params, state, params)
        return (optax.apply_updates(params, updates), state), None

    def run(scale: jax.Array) -> Any:
        params = jax.tree.map(lambda p: scale * p, make_params())
        return jax.lax.scan(step, (params, tx.init(params)), length=3)[0]

    scales = jnp.array([1.0, -3.0, 1e-3])
    separate = [jax.jit(run)(scale) for scale in scales]
    chex.assert_trees_all_close(
        jax.jit(jax.vmap(run))(scales),
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *separate),
        rtol=1e-4,
        atol=1e-6,
    )


@pytest.mark.slow(but=7)
@pytest.mark.parametrize(
    "tree",
    [
        {},
        [],
        {"a": None},
        [{"a": None, "b": (jnp.ones((3, 2)), None)}, {}],
        {"empty": jnp.zeros((0, 3)), "more": jnp.zeros((0,)), "one": jnp.ones((1, 1))},
    ],
    ids=["dict", "list", "None leaf", "nested None", "empty arrays"],
)
@every_optimizer
def test_none_leaves_empty_trees_and_empty_arrays(name: str, tree: Any) -> None:
    tx = OPTIMIZERS[name]
    state = tx.init(tree)
    updates, after = jax.jit(tx.update)(tree, state, tree)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, tree)
    assert types(after) == types(state)
    chex.assert_tree_all_finite((updates, after))


@pytest.mark.slow(but=2)
@pytest.mark.parametrize("wrap", [lambda tx: tx, lambda tx: optax.MultiSteps(tx, 1)])
@pytest.mark.parametrize("inject", [False, True])
def test_count_beside_a_schedule_is_that_of_a_named_state(
    wrap: Any, inject: bool
) -> None:
    """``optax.tree.get(state, "count")`` is as ambiguous as with ``optax.adamw``."""
    make = optax.inject_hyperparams(came_optax.came) if inject else came_optax.came
    tx = wrap(make(optax.linear_schedule(0.0, 1e-3, 10)))
    params = make_params()
    state = tx.init(params)
    with jax.numpy_dtype_promotion("standard"):  # MultiSteps promotes.
        for _ in range(3):
            _, state = tx.update(params, state, params)
    assert optax.tree.get(state, "ScaleByCameState").count == 3
    with pytest.raises(KeyError, match="multiple values for 'count'"):
        optax.tree.get(state, "count")
    assert optax.tree.get(came_optax.came(1e-3).init(params), "count") == 0

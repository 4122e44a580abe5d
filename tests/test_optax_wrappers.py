"""came and its halves inside optax's wrappers."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import came_optax
from came_optax import BalancedSplit, LargestTwoAxes, LastTwoAxes, Stacked

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
    "scale_by_factored_moment": came_optax.scale_by_factored_moment(),
    "scale_by_confidence": came_optax.scale_by_confidence(),
}
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def make_params(dtype: Any = jnp.float32) -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    shapes = {"bias": (3,), "kernel": (2, 5, 3), "scale": ()}
    return {
        name: jnp.asarray(rng.normal(size=shape).astype(dtype))
        for name, shape in shapes.items()
    }


@pytest.mark.slow(but=2)
@pytest.mark.parametrize(
    "make, options",
    [
        (came_optax.came, {"learning_rate": 1e-2}),
        (
            came_optax.came,
            {
                "learning_rate": 1e-2,
                "weight_decay": 0.1,
                "weight_decay_mask": [True, False],
                "clipping_threshold": None,
                "factoring": Stacked(BalancedSplit(), where="1"),
                "mu_dtype": "bfloat16",
                "bias_correction": True,
                "update_clipping_threshold": 1,
            },
        ),
        (came_optax.scale_by_came, {"factoring": LargestTwoAxes(1)}),
        (came_optax.scale_by_factored_moment, {"bias_correction": True}),
        (came_optax.scale_by_confidence, {"factoring": LastTwoAxes()}),
    ],
    ids=["came", "came with options", "scale_by_came", "first half", "second half"],
)
def test_injected_hyperparams_give_the_plain_updates(make: Any, options: Any) -> None:
    params = [-jnp.ones((2, 3)), jnp.ones((2, 5, 2))]
    grads = [jnp.ones((2, 3)), jnp.linspace(-1.0, 1.0, 20).reshape(2, 5, 2)]
    plain, injected = make(**options), optax.inject_hyperparams(make)(**options)

    state, injected_state = jax.jit(plain.init)(params), jax.jit(injected.init)(params)
    statistic = "s_col" if make is came_optax.scale_by_confidence else "v_col"
    assert all(x.size > 1 for x in optax.tree.get(state, statistic))
    for _ in range(3):
        updates, state = jax.jit(plain.update)(grads, state, params)
        same_updates, injected_state = jax.jit(injected.update)(
            grads, injected_state, params
        )
        chex.assert_trees_all_close(same_updates, updates, rtol=1e-5)
        chex.assert_trees_all_close(injected_state.inner_state, state, rtol=1e-5)


@every_optimizer
def test_the_kernel_is_factored(name: str) -> None:
    state = OPTIMIZERS[name].init(make_params())
    statistic = "s_col" if name == "scale_by_confidence" else "v_col"
    assert optax.tree.get(state, statistic)["kernel"].size > 1


@every_optimizer
def test_map_params_finds_every_array_but_the_counts(name: str) -> None:
    tx, params = OPTIMIZERS[name], make_params()
    state = tx.init(params)
    marked = optax.tree.map_params(
        tx, lambda _: "param", state, transform_non_params=lambda _: "other"
    )
    for path, mark in jax.tree.leaves_with_path(marked):
        is_count = jax.tree_util.keystr(path).endswith(".count")
        assert mark == ("other" if is_count else "param"), path


@pytest.mark.slow(but=2)
@every_optimizer
def test_multi_steps_is_one_step_on_the_mean(name: str) -> None:
    tx, params = OPTIMIZERS[name], make_params(jnp.bfloat16)
    accumulating = optax.MultiSteps(tx, every_k_schedule=2)
    state = accumulating.init(params)
    with jax.numpy_dtype_promotion("standard"):  # which MultiSteps itself needs
        update = jax.jit(accumulating.update)
        first, state = update(params, state, params)
        opposite = jax.tree.map(lambda p: -3 * p, params)
        second, state = update(opposite, state, params)
    chex.assert_trees_all_equal(first, optax.tree.zeros_like(params))
    mean = jax.tree.map(jnp.negative, params)
    expected, _ = jax.jit(tx.update)(mean, tx.init(params), params)
    chex.assert_trees_all_close(
        optax.tree.cast(second, jnp.float32),
        optax.tree.cast(expected, jnp.float32),
        rtol=3e-2,  # of bfloat16, in which MultiSteps sums
    )


@every_optimizer
def test_masked_leaves_pass_through(name: str) -> None:
    tx, params = OPTIMIZERS[name], make_params()
    masked = optax.masked(tx, {"bias": True, "kernel": True, "scale": False})
    updates, _ = jax.jit(masked.update)(params, masked.init(params), params)
    kept = {leaf: params[leaf] for leaf in ("bias", "kernel")}
    expected, _ = jax.jit(tx.update)(kept, tx.init(kept), kept)
    chex.assert_trees_all_close(updates, expected | {"scale": params["scale"]})


@every_optimizer
def test_partition_gives_each_group_its_optimizer(name: str) -> None:
    tx, params = OPTIMIZERS[name], make_params() | {"step": jnp.zeros((), jnp.int32)}
    partitioned = optax.partition(
        {"ours": tx, "sgd": optax.sgd(1.0), "frozen": optax.set_to_zero()},
        {"bias": "sgd", "kernel": "ours", "scale": "ours", "step": "frozen"},
    )
    updates, _ = jax.jit(partitioned.update)(params, partitioned.init(params), params)
    ours = {leaf: params[leaf] for leaf in ("kernel", "scale")}
    expected, _ = jax.jit(tx.update)(ours, tx.init(ours), ours)
    others = {"bias": -params["bias"], "step": params["step"]}
    chex.assert_trees_all_close(updates, expected | others)


@pytest.mark.slow(but=3)
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
@every_optimizer
def test_apply_if_finite_keeps_the_state_on_a_bad_step(name: str, bad: float) -> None:
    params = make_params()
    tx = optax.apply_if_finite(OPTIMIZERS[name], max_consecutive_errors=5)
    update = jax.jit(tx.update)
    _, state = update(params, tx.init(params), params)
    grads = params | {"kernel": params["kernel"].at[0, 0].set(bad)}
    updates, after = update(grads, state, params)
    chex.assert_trees_all_equal(updates, optax.tree.zeros_like(params))
    chex.assert_trees_all_equal(after.inner_state, state.inner_state)
    good, _ = update(params, after, params)
    expected, _ = update(params, state, params)
    chex.assert_trees_all_equal(good, expected)


def test_a_schedule_is_its_values() -> None:
    params, values = make_params(), [1e-3, 3e-3]
    scheduled = came_optax.came(lambda count: jnp.array(values)[count])
    state = scheduled.init(params)
    for value in values:
        constant = came_optax.came(value)
        expected, _ = jax.jit(constant.update)(
            params, (state[0], *constant.init(params)[1:]), params
        )
        updates, state = jax.jit(scheduled.update)(params, state, params)
        chex.assert_trees_all_close(updates, expected, rtol=1e-6)

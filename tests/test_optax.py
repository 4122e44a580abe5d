"""What optax asks of its optimizers: types, compilation, memory and its wrappers."""

import logging

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from came_optax import (
    BalancedSplit,
    Codes,
    LargestTwoAxes,
    LastTwoAxes,
    Stacked,
    _algorithm,
    came,
    scale_by_came,
    scale_by_confidence,
    scale_by_factored_moment,
)
from tests.optimizers import OPTIMIZERS

SHAPES = {"bias": (3,), "kernel": (2, 48, 46), "twin": (2, 48, 46), "scale": ()}

every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def make_params(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return {n: jnp.asarray(rng.normal(size=s).astype(dtype)) for n, s in SHAPES.items()}


@every_optimizer
def test_the_kernel_is_factored_and_stored_as_codes(name):
    state = OPTIMIZERS[name].init(make_params())
    statistic = "s_col" if name == "second half" else "v_col"
    assert optax.tree.get(state, statistic)["kernel"].size > 1
    if name in ("int8", "int4"):
        assert isinstance(optax.tree.get(state, "mu")["kernel"], Codes)


@pytest.mark.slow(but=3)
@every_optimizer
def test_second_call_compiles_nothing_whatever_extra_args(name, caplog):
    tx, params = OPTIMIZERS[name], make_params()

    @jax.jit
    def step(params, state):
        updates, state = tx.update(params, state, params, value=1.0, unknown_to_came=2)
        return optax.apply_updates(params, updates), state

    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        params, state = step(params, tx.init(params))
        assert "Finished XLA compilation of jit(step)" in caplog.text
        caplog.clear()
        step(params, state)
    assert "compilation" not in caplog.text


@pytest.mark.parametrize("mu_dtype", ["float32", "int8"])
def test_leaves_of_one_shape_are_traced_once(monkeypatch, mu_dtype):
    traced, divide = [], _algorithm.divide_by_root

    def recorded(x, *args):
        traced.append(x.shape)
        return divide(x, *args)

    monkeypatch.setattr(_algorithm, "divide_by_root", recorded)
    tx = scale_by_came(mu_dtype=mu_dtype)

    def traces(leaves, width):
        traced.clear()
        params = [jax.ShapeDtypeStruct((64, width), jnp.float32)] * leaves
        jax.eval_shape(tx.update, params, jax.eval_shape(tx.init, params), params)
        return len(traced)

    assert traces(5, 1019) == traces(1, 1021) > 0  # Of shapes not traced before.


@every_optimizer
def test_init_needs_only_shapes(name):
    tx, params = OPTIMIZERS[name], make_params(jnp.bfloat16)
    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
    chex.assert_trees_all_equal(tx.init(shapes), tx.init(params))
    abstract = jax.eval_shape(tx.init, shapes)
    chex.assert_trees_all_equal_shapes_and_dtypes(abstract, tx.init(params))


@pytest.mark.slow(but=1)
@every_optimizer
def test_vmap_over_an_ensemble_equals_separate_runs(name):
    tx = OPTIMIZERS[name]

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(params, state, params)
        return (optax.apply_updates(params, updates), state), None

    def run(scale):
        params = jax.tree.map(lambda p: scale * p, make_params())
        return jax.lax.scan(step, (params, tx.init(params)), length=3)[0]

    scales = jnp.array([1.0, -3.0, 1e-3])
    separate = [jax.jit(run)(scale) for scale in scales]
    together = jax.jit(jax.vmap(run))(scales)
    chex.assert_trees_all_equal_dtypes(together, separate[0])
    exact = 0 if name in ("int8", "int4") else slice(None)  # Codes may be neighbours.
    chex.assert_trees_all_close(
        together[exact],
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *separate)[exact],
        rtol=1e-4,
        atol=1e-4 if exact == 0 else 1e-6,
    )


@pytest.mark.slow(but=1)
@pytest.mark.parametrize("wrap", [lambda tx: tx, lambda tx: optax.MultiSteps(tx, 1)])
@pytest.mark.parametrize("inject", [False, True])
def test_count_beside_a_schedule_is_that_of_a_named_state(wrap, inject):
    """``optax.tree.get(state, "count")`` is as ambiguous as with ``optax.adamw``."""
    make = optax.inject_hyperparams(came) if inject else came
    tx, params = wrap(make(optax.linear_schedule(0.0, 1e-3, 10))), make_params()
    state = tx.init(params)
    with jax.numpy_dtype_promotion("standard"):  # MultiSteps promotes.
        for _ in range(3):
            _, state = tx.update(params, state, params)
    assert optax.tree.get(state, "ScaleByCameState").count == 3
    with pytest.raises(KeyError, match="multiple values for 'count'"):
        optax.tree.get(state, "count")
    assert optax.tree.get(came(1e-3).init(params), "count") == 0


def buffers(tree):
    return [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)]


@pytest.mark.slow(but=2)
@pytest.mark.parametrize("jitted", [True, False], ids=["jitted init", "eager init"])
@pytest.mark.parametrize("name", [*OPTIMIZERS, "injected"])
def test_params_and_state_are_donated_whole(name, jitted):
    tx = {**OPTIMIZERS, "injected": optax.inject_hyperparams(came)(1e-3)}[name]
    # jax 0.8.1 does not reuse NumPy's memory.
    params, grads = jax.tree.map(jnp.copy, make_params()), make_params()
    state = (jax.jit(tx.init) if jitted else tx.init)(params)
    assert len(set(buffers((params, state)))) == len(buffers((params, state)))

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step, donate_argnums=(0, 1))
    for _ in range(2):
        donated = params, state
        given = set(buffers(donated))
        params, state = step(params, state, grads)
        # Not merely deleted: the outputs live where the inputs were.
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(donated))
        assert set(buffers((params, state))) == given
        assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(grads))


OPTIONS = {
    "weight_decay": 0.1,
    "weight_decay_mask": [True, False],
    "clipping_threshold": None,
    "factoring": Stacked(BalancedSplit(), where="1"),
    "mu_dtype": "bfloat16",
    "bias_correction": True,
    "update_clipping_threshold": 1,
}


@pytest.mark.slow(but=2)
@pytest.mark.parametrize(
    ("make", "options"),
    [
        (came, {"learning_rate": 1e-2}),
        (came, {"learning_rate": 1e-2, **OPTIONS}),
        (scale_by_came, {"factoring": LargestTwoAxes(1)}),
        (scale_by_factored_moment, {"bias_correction": True}),
        (scale_by_confidence, {"factoring": LastTwoAxes()}),
    ],
    ids=["came", "came with options", "scale_by_came", "first half", "second half"],
)
def test_injected_hyperparams_give_the_plain_updates(make, options):
    params = [-jnp.ones((2, 3)), jnp.ones((2, 5, 2))]
    grads = [jnp.ones((2, 3)), jnp.linspace(-1.0, 1.0, 20).reshape(2, 5, 2)]
    txs = make(**options), optax.inject_hyperparams(make)(**options)
    state, injected = (jax.jit(tx.init)(params) for tx in txs)
    statistic = "s_col" if make is scale_by_confidence else "v_col"
    assert all(x.size > 1 for x in optax.tree.get(state, statistic))
    plain_update, injected_update = (jax.jit(tx.update) for tx in txs)
    for _ in range(3):
        updates, state = plain_update(grads, state, params)
        same_updates, injected = injected_update(grads, injected, params)
        chex.assert_trees_all_close(same_updates, updates, rtol=1e-5)
        chex.assert_trees_all_close(injected.inner_state, state, rtol=1e-5)


@every_optimizer
def test_map_params_finds_every_array_but_the_counts(name):
    tx = OPTIMIZERS[name]
    marked = optax.tree.map_params(
        tx,
        lambda _: "param",
        tx.init(make_params()),
        transform_non_params=lambda _: "other",
    )
    for path, mark in jax.tree.leaves_with_path(marked):
        is_count = jax.tree_util.keystr(path).endswith(".count")
        assert mark == ("other" if is_count else "param"), path


@pytest.mark.slow(but=1)
@every_optimizer
def test_multi_steps_is_one_step_on_the_mean(name):
    tx, params = OPTIMIZERS[name], make_params(jnp.bfloat16)
    accumulating = optax.MultiSteps(tx, every_k_schedule=2)
    with jax.numpy_dtype_promotion("standard"):  # which MultiSteps itself needs
        update = jax.jit(accumulating.update)
        first, state = update(params, accumulating.init(params), params)
        opposite = jax.tree.map(lambda p: -3 * p, params)
        second, _ = update(opposite, state, params)
    chex.assert_trees_all_equal(first, optax.tree.zeros_like(params))
    mean = jax.tree.map(jnp.negative, params)
    expected, _ = jax.jit(tx.update)(mean, tx.init(params), params)
    # Of bfloat16, in which MultiSteps sums.
    second, expected = (optax.tree.cast(x, jnp.float32) for x in (second, expected))
    chex.assert_trees_all_close(second, expected, rtol=3e-2)


@pytest.mark.slow(but=2)
@every_optimizer
def test_partition_gives_each_group_its_optimizer(name):
    tx, params = OPTIMIZERS[name], make_params() | {"step": jnp.zeros((), jnp.int32)}
    partitioned = optax.partition(
        {"ours": tx, "sgd": optax.sgd(1.0), "frozen": optax.set_to_zero()},
        {"step": "frozen", "bias": "sgd"}
        | dict.fromkeys(("kernel", "twin", "scale"), "ours"),
    )
    updates, _ = jax.jit(partitioned.update)(params, partitioned.init(params), params)
    ours = {leaf: params[leaf] for leaf in ("kernel", "twin", "scale")}
    expected, _ = jax.jit(tx.update)(ours, tx.init(ours), ours)
    others = {"bias": -params["bias"], "step": params["step"]}
    chex.assert_trees_all_close(updates, expected | others)


def test_a_schedule_is_its_values():
    params, values = make_params(), [1e-3, 3e-3]
    scheduled = came(lambda count: jnp.array(values)[count])
    state = scheduled.init(params)
    for value in values:
        constant = came(value)
        same_state = (state[0], *constant.init(params)[1:])
        expected, _ = jax.jit(constant.update)(params, same_state, params)
        updates, state = jax.jit(scheduled.update)(params, state, params)
        chex.assert_trees_all_close(updates, expected, rtol=1e-6)


def test_schedule_free_takes_came_without_momentum():
    """It brings a momentum of its own; and steps would be of 10⁹ learning rates."""
    target = jnp.asarray(np.random.default_rng(0).normal(size=(6, 5)), jnp.float32)
    tx = optax.contrib.schedule_free(came(0.05, b1=0.0), 0.05, b1=0.9)
    params = jnp.zeros((6, 5))

    @jax.jit
    def step(params, state):
        updates, state = tx.update(2 * (params - target), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(300):
            params, state = step(params, state)
        found = optax.contrib.schedule_free_eval_params(state, params)
    np.testing.assert_allclose(found, target, atol=0.05)

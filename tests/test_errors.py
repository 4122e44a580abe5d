"""Each misuse gives one error, which names the argument or leaf and what is allowed."""

import inspect
import pickle

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from came_optax import (
    LargestTwoAxes,
    LastTwoAxes,
    came,
    came_muon,
    quantized_ema,
    scale_by_came,
    scale_by_confidence,
    scale_by_factored_moment,
    steady_came,
)
from came_optax._momentum import MuDtype

PARAMS = {"kernel": jnp.ones((6, 4)), "bias": jnp.ones(4)}
NUMBER = "must be a number or an array, got "
SCHEDULE = optax.constant_schedule(0.9)


@pytest.mark.parametrize(
    "argument, value, error, message",
    [
        ("learning_rate", -1e-3, ValueError, ">= 0 and < inf .*got -0.001"),
        ("learning_rate", float("nan"), ValueError, ">= 0 and < inf .*got nan"),
        ("learning_rate", "0.1", TypeError, "a schedule, got '0.1'"),
        ("learning_rate", None, TypeError, "a schedule, got None"),
        ("b1", 1.0, ValueError, r">= 0 and < 1 \(in float32\), got 1.0"),
        ("b2", -0.1, ValueError, ">= 0 and < 1 .*got -0.1"),
        ("b3", 0.99999999, ValueError, ">= 0 and < 1 .*got 0.99999999"),
        ("b1", True, TypeError, NUMBER + "True"),
        ("b1", 0.9 + 0j, TypeError, NUMBER),
        ("b1", SCHEDULE, TypeError, NUMBER + ".*use optax.inject_hyperparams"),
        (
            "b1",
            jnp.array([0.9, 0.9]),
            ValueError,
            r"must be a scalar, got shape \(2,\)",
        ),
        ("b1", np.array(2.0), ValueError, ">= 0 and < 1 .*got .*2.0"),
        ("b1", np.complex64(0.5), TypeError, NUMBER),
        ("weight_decay", 10**400, ValueError, ">= 0 and < inf .*got 1000"),
        ("b1", jnp.array(0.9 + 0j), TypeError, "must be a real number.*complex64"),
        ("b2", jnp.bfloat16(0.999), ValueError, "bfloat16.*float32 and wider"),
        ("b2", ml_dtypes.bfloat16(0.999), ValueError, "< 1 .*got 1.0"),
        ("learning_rate", ml_dtypes.bfloat16(-1), ValueError, ">= 0 .*got -1.0"),
        ("eps1", 0.0, ValueError, ">= 1e-30 and < inf .*got 0.0"),
        ("eps1", 1e-38, ValueError, ">= 1e-30"),
        ("eps2", float("inf"), ValueError, ">= 1e-30 and < inf .*got inf"),
        ("clipping_threshold", 0, ValueError, "> 0 and < inf .*got 0"),
        ("clipping_threshold", "1", TypeError, NUMBER + "'1'"),
        ("update_clipping_threshold", -1.0, ValueError, "> 0 and < inf .*got -1.0"),
        ("weight_decay", -0.1, ValueError, ">= 0 and < inf .*got -0.1"),
        ("weight_decay", None, TypeError, NUMBER + "None"),
        ("mu_dtype", "float16", ValueError, "one of 'float32', 'bfloat16'.*'float16'"),
        ("mu_dtype", jnp.uint8, ValueError, "one of 'float32', 'bfloat16'.*uint8"),
        ("mu_dtype", 0, ValueError, "one of 'float32', 'bfloat16'.*got 0"),
        ("nesterov", 1, TypeError, "True or False, got 1"),
        ("bias_correction", "no", TypeError, "True or False, got 'no'"),
        ("factoring", LastTwoAxes, TypeError, r"such as LastTwoAxes\(\), got <class"),
        ("factoring", None, TypeError, r"such as LastTwoAxes\(\), got None"),
        ("factoring", lambda path, shape: None, TypeError, "got <function"),
    ],
)
def test_arguments(argument, value, error, message):
    with pytest.raises(error, match=f"^{argument} .*{message}"):
        came(**{"learning_rate": 1e-3, argument: value})


def test_a_scalar_of_ml_dtypes_is_a_number():
    rate = ml_dtypes.bfloat16(1e-3)
    tx, expected = came(rate, weight_decay=rate), came(float(rate), weight_decay=rate)
    with jax.numpy_dtype_promotion("standard"):
        (updates, _), (wanted, _) = (
            tx.update(PARAMS, tx.init(PARAMS), PARAMS) for tx in (tx, expected)
        )
    chex.assert_trees_all_close(updates, wanted)


def test_adamws_positional_eps_is_not_taken_for_b3():
    with pytest.raises(TypeError, match="positional"):
        steady_came(1e-3, 0.9, 0.95, 1e-8)


@pytest.mark.parametrize(
    "make",
    [lambda: optax.adamw(1e-3), lambda: steady_came(1e-3)],
    ids=["adamw", "came"],
)
def test_came_muon_names_a_state_that_is_not_its_own(make):
    params = {"kernel": jnp.ones((8, 16))}
    with pytest.raises(TypeError, match="state of came_muon must be a PartitionState"):
        came_muon(1e-3).update(params, make().init(params), params)


def test_came_muon_names_the_groups_of_muons_state():
    params = {"kernel": jnp.ones((8, 16))}
    state = optax.contrib.muon(1e-3).init(params)
    with pytest.raises(TypeError, match=r"groups 'hidden' and 'rest', got .*convert"):
        came_muon(1e-3).update(params, state, params)


@pytest.mark.parametrize("make", [steady_came, came_muon])
def test_a_schedules_state_is_not_a_numbers(make):
    params = {"kernel": jnp.ones((8, 16)), "bias": jnp.ones(3)}
    number, schedule = make(1e-3), make(optax.constant_schedule(1e-3))
    for tx, other, got in (
        (schedule, number, "EmptyState"),
        (number, schedule, "ScaleByScheduleState"),
    ):
        with pytest.raises(TypeError, match=f"learning rate must be .* got a {got}"):
            tx.update(params, other.init(params), params)


@pytest.mark.parametrize("make", [came, steady_came, scale_by_came])
def test_signatures_are_those_of_the_arguments(make):
    parameters = inspect.signature(make).parameters.values()
    assert all(p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)
    assert len(str(inspect.signature(make))) < len(str(inspect.signature(optax.adamw)))
    evaluated = inspect.signature(make, eval_str=True)
    assert evaluated.parameters["mu_dtype"].annotation == MuDtype
    assert pickle.loads(pickle.dumps(make)) is make
    learning_rate = () if make is scale_by_came else (1e-3,)
    state = optax.inject_hyperparams(make)(*learning_rate).init(PARAMS)
    assert {"b1", "b3", "clipping_threshold"} <= state.hyperparams.keys()


@pytest.mark.parametrize(
    ("leaf", "kind"),
    [
        (jnp.ones((3, 2), jnp.int32), "dtype int32"),
        (np.ones((3, 2), bool), "dtype bool"),
        (jax.random.key(0), "dtype key"),
        (1.0, "type float"),
        ("text", "type str"),
        (object(), "type object"),
    ],
)
def test_leaves_that_are_no_arrays_of_numbers(leaf, kind):
    tx, bad = came(1e-3), PARAMS | {"steps": [leaf]}
    message = f"leaf 'steps/0' of the {{}} has {kind}.*floating point or complex"
    with pytest.raises(TypeError, match=message.format("params")):
        tx.init(bad)
    state = tx.init(PARAMS | {"steps": [jnp.ones((3, 2))]})
    with pytest.raises(TypeError, match=message.format("updates")):
        tx.update(bad, state)


KERNEL = {"kernel": PARAMS["kernel"]}
TRANSPOSED = PARAMS | {"kernel": PARAMS["kernel"].T}


@pytest.mark.parametrize(
    ("updates", "params", "message"),
    [
        (PARAMS, KERNEL, "'bias' is in the updates but not in the params"),
        (KERNEL, PARAMS, "'bias' is in the params but not in the updates"),
        (None, PARAMS, "'bias' is in the params but not in the updates"),
        (PARAMS, TRANSPOSED, r"\(4, 6\) in the params and \(6, 4\) in the updates"),
        ([*PARAMS.values()], PARAMS, "'bias' is in the params but not in the updates"),
    ],
)
def test_updates_against_params(updates, params, message):
    tx = came(1e-3)
    with pytest.raises(ValueError, match=message):
        tx.update(updates, tx.init(PARAMS), params)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (KERNEL, "'bias' is in the state but not in the updates"),
        (KERNEL | {"bias": None}, "'bias' is in the state but not"),
        (PARAMS | {"x": jnp.ones(2)}, "'x' is in the updates but not in the state"),
        ((*PARAMS.values(),), "leaf '0' is in the updates but not in the state"),
        (TRANSPOSED, r"'kernel' has shape \(6,.* \(4, 6\) .*must be \(4,"),
        (KERNEL | {"bias": jnp.ones(3)}, r"'bias' has shape \(4,\).* \(3,\)"),
    ],
)
def test_a_changed_model_with_an_old_state(model, message):
    for tx in (scale_by_factored_moment(), scale_by_confidence()):
        with pytest.raises(ValueError, match=message):
            tx.update(model, tx.init(PARAMS), model)


def test_trees_that_differ_in_nodes_alone():
    tx, ones = scale_by_came(), jnp.ones(2)
    state = tx.init({"a": ones, "b": [ones, ones]})
    message = r"updates and state differ at 'b': tuple\('0', '1'\) and list\('0', '1'\)"
    with pytest.raises(ValueError, match=message):
        tx.update({"a": ones, "b": (ones, ones)}, state)


def cast(state, dtype):
    return jax.tree.map(lambda x: x if x.dtype == jnp.int32 else x.astype(dtype), state)


CAME = came(1e-3)


@pytest.mark.parametrize(
    ("tx", "state", "error", "message"),
    [
        (CAME, None, TypeError, "must be a tuple as made by init, got a NoneType"),
        (CAME, optax.adam(1.0).init(PARAMS), ValueError, "must have 3 parts .*, got 2"),
        (CAME, optax.adamw(1.0).init(PARAMS), TypeError, "got a ScaleByAdamState"),
        (
            CAME,
            came(1e-3, factoring=LargestTwoAxes()).init(PARAMS),
            ValueError,
            r"v_row of leaf 'kernel' has shape \(1,\).*must be \(6,\)",
        ),
        (
            CAME,
            came(1e-3, mu_dtype="bfloat16").init(PARAMS),
            TypeError,
            "mu of leaf .bias. has dtype bfloat16.*mu_dtype=.float32. it must be fl",
        ),
        (
            CAME,
            cast(CAME.init(PARAMS), jnp.bfloat16),
            TypeError,
            "v_row of leaf 'bias' has dtype bfloat16.*cast when saved or restored",
        ),
        (
            CAME,
            CAME.init(cast(PARAMS, jnp.complex64)),
            TypeError,
            "mu of leaf 'bias' has dtype complex64; for float32 updates",
        ),
        (
            scale_by_came(),
            scale_by_confidence().init(PARAMS),
            TypeError,
            "a ScaleByCameState .*ScaleByConfidenceState",
        ),
        *(
            (
                make(),
                optax.scale_by_adam().init(PARAMS),
                TypeError,
                f"state of {make.__name__} must be a ScaleBy.*got a ScaleByAdamState",
            )
            for make in (scale_by_factored_moment, scale_by_confidence)
        ),
    ],
)
def test_states_of_other_optimizers(tx, state, error, message):
    with pytest.raises(error, match=message):
        tx.update(PARAMS, state, PARAMS)


@pytest.mark.parametrize("count", [jnp.zeros(3, jnp.int32), jnp.float32(3)])
@pytest.mark.parametrize("tx", [scale_by_came(), quantized_ema(0.9, debias=True)])
def test_a_count_that_is_none_is_refused(tx, count):
    state = tx.init(PARAMS)._replace(count=count)
    with pytest.raises(TypeError, match=r"^count in the state of .* must be an int"):
        tx.update(PARAMS, state)


def test_sixteen_bit_hyperparams_are_refused():
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    with pytest.raises(ValueError, match=r"hyperparam_dtype=jnp\.float32"):
        optax.inject_hyperparams(came)(1e-3).init(params)

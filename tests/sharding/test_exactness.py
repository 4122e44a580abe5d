"""Sharded updates equal those of one device, to float32 rounding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from came_optax import (
    BalancedSplit,
    LargestTwoAxes,
    LastTwoAxes,
    Stacked,
    came,
    state_sharding,
)

STEPS = 20
# Shapes, and specs on a mesh of one axis and of two. JAX lets no array that is passed
# between functions be split into uneven parts: 33 and 7 stay whole.
LEAVES = {
    "last/kernel": ((16, 40), P("fsdp"), P("fsdp", "tensor")),
    "last/uneven": ((33, 16), P(None, "fsdp"), P(None, ("fsdp", "tensor"))),
    "last/bias": ((40,), P("fsdp"), P("tensor")),
    "last/uneven_bias": ((7,), P(), P()),
    "largest/convolution": (
        (3, 3, 16, 32),
        P(None, None, None, "fsdp"),
        P(None, None, "fsdp", "tensor"),
    ),
    "balanced/projection": ((8, 16, 24), P(None, None, "fsdp"), P(("tensor", "fsdp"))),
    "stacked/kernels": ((4, 16, 24), P(None, "fsdp"), P("fsdp", None, "tensor")),
    "stacked/heads": ((8, 24, 2, 16), P("fsdp"), P(None, "fsdp", "tensor")),
}
SHAPES, FSDP, MIXED = (
    {name: leaf[i] for name, leaf in LEAVES.items()} for i in range(3)
)

RULES = {
    "last": LastTwoAxes(),
    "largest": LargestTwoAxes(16),
    "balanced": BalancedSplit(),
    "stacked": Stacked(BalancedSplit()),
}
TX = optax.partition(
    {name: came(1e-2, weight_decay=0.1, factoring=r) for name, r in RULES.items()},
    lambda params: {name: name.split("/")[0] for name in params},
)
ALL, FEW = tuple(LEAVES), ("last/kernel", "last/bias", "stacked/kernels")


def random_like(shapes, seed, **kwargs):
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(rng.normal(size=shape, **kwargs), jnp.float32)
        for name, shape in shapes.items()
    }


PARAMS = random_like(SHAPES, seed=0)
GRADS = random_like({name: (STEPS, *s) for name, s in SHAPES.items()}, seed=1)


def train(params, state, grads, constrain=lambda tree: tree):
    """Returns every step's updates, and the last parameters and state.

    ``constrain`` says how gradients and parameters are split within a step.
    """

    def step(carry, grads):
        params, state = constrain(carry[0]), carry[1]
        updates, state = TX.update(constrain(grads), state, params)
        return (optax.apply_updates(params, updates), state), updates

    (params, state), updates = jax.lax.scan(step, (params, state), grads)
    return updates, params, state


def compiled(fun, **kwargs):
    options = {"xla_backend_optimization_level": 0}  # Saves half of the time.
    return jax.jit(fun, compiler_options=options, **kwargs)


def some(names, *trees):
    return [{name: tree[name] for name in names} for tree in trees]


@functools.cache
def expected(names):
    params, grads = some(names, PARAMS, GRADS)
    return jax.device_get(compiled(train)(params, TX.init(params), grads))


@pytest.mark.parametrize(
    ("names", "specs", "sizes"),
    [
        pytest.param(ALL, FSDP, {"fsdp": 8}, marks=pytest.mark.slow),
        pytest.param(ALL, MIXED, {"fsdp": 4, "tensor": 2}, marks=pytest.mark.slow),
        (FEW, MIXED, {"fsdp": 4, "tensor": 2}),
    ],
    ids=["fsdp", "mixed", "few"],
)
def test_sharded_training_equals_one_device(auto_mesh, names, specs, sizes):
    mesh = auto_mesh(**sizes)
    params, grads, specs = some(names, PARAMS, GRADS, specs)
    of_params = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    of_grads = {name: NamedSharding(mesh, P(None, *s)) for name, s in specs.items()}
    of_state = state_sharding(TX, params, of_params)
    found = compiled(train, out_shardings=(of_grads, of_params, of_state))(
        jax.device_put(params, of_params),
        jax.device_put(TX.init(params), of_state),
        jax.device_put(grads, of_grads),
    )
    assert_close(found, expected(names))


def assert_close(found, expected):
    """Compares leaves to 1e-6 by norm, and elements to 1e-5 of the leaf's RMS.

    Sums in another order move a statistic, and with it a whole row, by units in the
    last place. A small element is only as exact as what cancelled in it: hence the RMS.
    Measured: 4e-7 and 4e-6.
    """

    def check(path, x, y):
        rms = np.sqrt(np.mean(np.square(y)))
        error = np.abs(x - y)
        norm = np.sqrt(np.mean(np.square(error))) / max(rms, 1e-30)
        largest = np.max(error / np.maximum(np.maximum(np.abs(y), rms), 1e-30))
        name = jax.tree_util.keystr(path)
        assert norm < 1e-6, f"{name}: {norm:.2g}"
        assert largest < 1e-5, f"{name}: {largest:.2g}"

    jax.tree.map_with_path(check, jax.device_get(found), expected)


@pytest.mark.slow
def test_uneven_parts_within_a_step_equal_one_device(auto_mesh):
    mesh = auto_mesh(fsdp=8)
    # 33 rows in parts of 5, the last empty; of 7 numbers one each on 7 devices.
    uneven = {name: P("fsdp") for name in ("last/uneven", "last/uneven_bias")}
    specs = dict.fromkeys(SHAPES, P()) | uneven
    shardings = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    for name in uneven:
        with pytest.raises(ValueError, match=r"partitioned 8 times|divisible by 8"):
            jax.device_put(PARAMS[name], shardings[name])

    def constrain(tree):
        return jax.lax.with_sharding_constraint(tree, shardings)

    arguments = jax.device_put(
        (PARAMS, TX.init(PARAMS), GRADS), NamedSharding(mesh, P())
    )
    run = compiled(lambda *arguments: train(*arguments, constrain)).lower(*arguments)
    run = run.compile()
    assert "f32[5,16]" in run.as_text()  # It is in parts, and the last is padded.
    assert_close(run(*arguments), expected(ALL))

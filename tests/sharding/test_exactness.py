"""Sharded updates equal those of one device, to float32 rounding."""

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
# Not every dimension can be divided: 33 and 7 stay whole.
SHAPES = {
    "last/kernel": (16, 40),
    "last/uneven": (33, 16),
    "last/bias": (40,),
    "last/uneven_bias": (7,),
    "largest/convolution": (3, 3, 16, 32),
    "balanced/projection": (8, 16, 24),
    "stacked/kernels": (4, 16, 24),
}
FSDP = {
    "last/kernel": P("fsdp"),
    "last/uneven": P(None, "fsdp"),
    "last/bias": P("fsdp"),
    "last/uneven_bias": P(),
    "largest/convolution": P(None, None, None, "fsdp"),
    "balanced/projection": P(None, None, "fsdp"),
    "stacked/kernels": P(None, "fsdp"),
}
TENSOR = {
    "last/kernel": P(None, "tensor"),
    "last/uneven": P(None, "tensor"),
    "last/bias": P("tensor"),
    "last/uneven_bias": P(),
    "largest/convolution": P(None, None, "tensor"),
    "balanced/projection": P(None, "tensor"),
    "stacked/kernels": P(None, None, "tensor"),
}
MIXED = {
    "last/kernel": P("fsdp", "tensor"),
    "last/uneven": P(None, ("fsdp", "tensor")),
    "last/bias": P("tensor"),
    "last/uneven_bias": P(),
    "largest/convolution": P(None, None, "fsdp", "tensor"),
    "balanced/projection": P(("tensor", "fsdp")),
    "stacked/kernels": P("fsdp", None, "tensor"),
}

RULES = {
    "last": LastTwoAxes(),
    "largest": LargestTwoAxes(16),
    "balanced": BalancedSplit(),
    "stacked": Stacked(LastTwoAxes()),
}
TX = optax.partition(
    {name: came(1e-2, weight_decay=0.1, factoring=r) for name, r in RULES.items()},
    {name: name.split("/")[0] for name in SHAPES},
)


def random_like(shapes, seed, **kwargs):
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(rng.normal(size=shape, **kwargs), jnp.float32)
        for name, shape in shapes.items()
    }


PARAMS = random_like(SHAPES, seed=0)
GRADS = random_like({name: (STEPS, *s) for name, s in SHAPES.items()}, seed=1)


def train(params, state, grads):
    """Returns every step's updates, and the last parameters and state."""

    def step(carry, grads):
        params, state = carry
        updates, state = TX.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), updates

    (params, state), updates = jax.lax.scan(step, (params, state), grads)
    return updates, params, state


def compiled(fun, **kwargs):
    options = {"xla_backend_optimization_level": 0}  # Saves half of the time.
    return jax.jit(fun, compiler_options=options, **kwargs)


@pytest.fixture(scope="module")
def expected():
    return jax.device_get(compiled(train)(PARAMS, TX.init(PARAMS), GRADS))


@pytest.mark.parametrize(
    ("specs", "sizes"),
    [
        (FSDP, {"fsdp": 8}),
        (TENSOR, {"tensor": 8}),
        (MIXED, {"fsdp": 4, "tensor": 2}),
    ],
    ids=["fsdp", "tensor", "mixed"],
)
def test_sharded_training_equals_one_device(auto_mesh, expected, specs, sizes):
    mesh = auto_mesh(**sizes)
    of_params = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    of_grads = {name: NamedSharding(mesh, P(None, *s)) for name, s in specs.items()}
    of_state = state_sharding(TX, PARAMS, of_params)
    found = compiled(train, out_shardings=(of_grads, of_params, of_state))(
        jax.device_put(PARAMS, of_params),
        jax.device_put(TX.init(PARAMS), of_state),
        jax.device_put(GRADS, of_grads),
    )

    def check(path, x, y):
        error = np.linalg.norm(np.ravel(x - y)) / max(
            np.linalg.norm(np.ravel(y)), 1e-30
        )
        assert error < 1e-6, f"{jax.tree_util.keystr(path)}: {error:.2g}"

    jax.tree.map_with_path(check, jax.device_get(found), expected)

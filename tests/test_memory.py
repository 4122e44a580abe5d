"""Bytes of optimizer state, counted before they are allocated."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

from came_optax import came, state_memory
from came_optax.memory import MODELS, OPTIMIZERS, abstract_params

PARAMS = {
    "embed": jnp.ones((100, 64)),
    "layer": {"kernel": jnp.ones((64, 64)), "bias": jnp.ones(64)},
}


@pytest.mark.parametrize(
    "tx",
    [
        came(1e-3),
        came(1e-3, mu_dtype="int4"),
        optax.adamw(optax.cosine_decay_schedule(1e-3, 10)),
        optax.MultiSteps(came(1e-3), 4).gradient_transformation(),
        optax.masked(came(1e-3), {"embed": True, "layer": False}),
        optax.inject_hyperparams(came)(learning_rate=1e-3),
    ],
    ids=["came", "int4", "adamw", "MultiSteps", "masked", "inject_hyperparams"],
)
def test_counts_what_init_allocates(tx):
    memory = state_memory(tx, PARAMS)
    leaves = jax.tree.leaves(tx.init(PARAMS))
    assert memory.total == sum(x.nbytes for x in leaves)
    for parts in (memory.by_dtype, memory.by_module, memory.by_leaf):
        assert sum(parts.values()) == memory.total
    assert memory.num_params == 100 * 64 + 64 * 64 + 64
    assert memory.bytes_per_param == memory.total / memory.num_params


def test_arrays_belong_to_their_parameters():
    memory = state_memory(optax.adamw(1e-3), PARAMS)
    assert memory.by_leaf == {
        "embed": 2 * 4 * 100 * 64,
        "layer/kernel": 2 * 4 * 64 * 64,
        "layer/bias": 2 * 4 * 64,
        "(other)": 4,
    }
    assert memory.total == memory.adamw


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_adamw_would_take(dtype):
    params = abstract_params("gpt2", dtype)
    assert state_memory(came(1e-3), params).adamw == sum(
        x.size * x.dtype.itemsize
        for x in jax.tree.leaves(jax.eval_shape(optax.adamw(1e-3).init, params))
    )


@pytest.mark.parametrize("model", ["bert-large", "gpt2-xl"])
@pytest.mark.parametrize(("mu_dtype", "most"), [("int8", 1.05), ("int4", 0.55)])
def test_narrow_momentum_of_large_models(model, mu_dtype, most):
    memory = state_memory(came(1e-3, mu_dtype=mu_dtype), abstract_params(model))
    assert memory.bytes_per_param <= most
    assert memory.adamw / memory.num_params == pytest.approx(8)


@pytest.mark.parametrize(
    ("model", "millions"),
    [
        ("bert-large", 335),
        ("gpt2", 124),
        ("gpt2-xl", 1558),
        ("t5-3b", 2850),
        ("t5-11b", 11307),
    ],
)
def test_models_have_their_published_sizes(model, millions):
    memory = state_memory(optax.sgd(1e-3), abstract_params(model))
    assert memory.num_params / 1e6 == pytest.approx(millions, rel=0.01)


def test_flax_parameters():
    model = nnx.eval_shape(lambda: nnx.Linear(64, 64, rngs=nnx.Rngs(0)))
    memory = state_memory(came(1e-3), nnx.state(model, nnx.Param))
    assert memory.num_params == 64 * 65
    assert set(memory.by_module) == {"kernel", "bias", "(other)"}


def test_prints_an_aligned_table():
    lines = str(state_memory(came(1e-3), PARAMS)).splitlines()
    assert len({len(line.rstrip()) for line in lines if "/" not in line}) <= 3
    assert lines[0].split() == ["parameters", "state", "bytes", "bytes/param"]
    assert [line.split()[0] for line in lines[1:5]] == [
        "embed",
        "layer",
        "(other)",
        "total",
    ]
    assert lines[-1].startswith("AdamW")


def test_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "came_optax.memory", "--model=gpt2"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "124,439,808" in done.stdout
    wrong = subprocess.run(
        [sys.executable, "-m", "came_optax.memory", "--model=gpt5"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert wrong.returncode == 2
    assert "invalid choice: 'gpt5'" in wrong.stderr
    assert set(OPTIMIZERS) >= {"adamw", "came", "came-int8"}
    assert "bert-4b" in MODELS

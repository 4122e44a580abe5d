"""Bytes of optimizer state, counted before they are allocated."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import PartitionSpec

from came_optax import (
    BalancedSplit,
    ByPath,
    FactoredAxes,
    LastTwoAxes,
    came,
    state_memory,
    state_sharding,
)

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


def test_codes_belong_to_their_parameter_whatever_its_name():
    """Here a parameter has the name that codes' own array has."""

    class Keyed(eqx.Module):
        keys: jax.Array
        values: jax.Array

    params = Keyed(jnp.ones((64, 64)), jnp.ones((128, 64)))
    memory = state_memory(came(1e-3, mu_dtype="int8"), params)
    # Codes, and means and scales of rows and columns, and placeholders.
    alone = {
        name: state_memory(came(1e-3, mu_dtype="int8"), {name: x}).by_leaf[name]
        for name, x in (("keys", params.keys), ("values", params.values))
    }
    assert memory.by_leaf == alone | {"(other)": 4}


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
    params = jax.tree.map(lambda p: p.astype(dtype), PARAMS)
    assert state_memory(came(1e-3), params).adamw == sum(
        x.size * x.dtype.itemsize
        for x in jax.tree.leaves(jax.eval_shape(optax.adamw(1e-3).init, params))
    )


@pytest.mark.parametrize("boxes", ["nnx", "linen"])
def test_names_of_boxed_parameters_are_those_that_rules_see(boxes):
    """A regular expression that is copied from the table, or from an error, matches."""
    model = nnx.eval_shape(lambda: nnx.Linear(64, 64, rngs=nnx.Rngs(0)))
    params = nnx.state(model, nnx.Param)
    if boxes == "linen":
        params = jax.tree.map(
            lambda p: nn.Partitioned(p, (None,) * p.ndim), nnx.to_pure_dict(params)
        )
    memory = state_memory(came(1e-3), params)
    assert memory.num_params == 64 * 65
    assert set(memory.by_module) == {"kernel", "bias", "(other)"}
    assert set(memory.by_leaf) == {"kernel", "bias", "(other)"}
    assert memory.rows == {"kernel": (64,)}
    rule = ByPath({f"^{name}$": FactoredAxes() for name in memory.rows})
    assert not state_memory(came(1e-3, factoring=rule), params).rows
    tx = came(1e-3)
    integers = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, int), params)
    for fails in (tx.init, lambda p: tx.update(p, tx.init(params), params)):
        with pytest.raises(TypeError, match="leaf 'bias' of the"):
            jax.eval_shape(fails, integers)
    with pytest.raises(ValueError, match="params_sharding at 'bias' is"):
        state_sharding(tx, params, PartitionSpec(None, "x", "y"))
    with pytest.raises(ValueError, match="params_sharding does not fit the parameters"):
        state_sharding(tx, params, {"kernel": PartitionSpec(), "bias": None})


def test_prints_an_aligned_table():
    lines = str(state_memory(came(1e-3), PARAMS)).splitlines()
    assert lines[0].split() == ["parameters", "state", "bytes", "bytes/param"]
    heads = "parameters", "state bytes", "bytes/param"
    ends = [lines[0].index(head) + len(head) for head in heads]
    for line in lines[1:]:
        numbers = re.finditer(r"(?<= )[\d,.]+(?= |$)", line)
        assert [match.end() for match in numbers] in (ends, ends[1:2]), line
    names = [line.split("  ")[0] for line in lines[1:]]
    assert names[:4] == ["embed", "layer", "(other)", "total"]
    # Beside a MultiSteps, for one, it has none.
    assert names[-1] == "AdamW alone"


def shapes(tree):
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        tree,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def test_table_of_leaves():
    params = {"q_einsum": (4, 32, 16), "query": (32, 4, 16)}
    params = shapes(params | {"experts": (2, 32, 64), "bias": (4, 16)})
    by_path = {"q_einsum": FactoredAxes((1,), (0, 2)), "bias": FactoredAxes()}
    rule = ByPath(by_path | {"experts": LastTwoAxes()}, default=BalancedSplit())
    memory = state_memory(came(1e-3, factoring=rule), params)
    lines = [line.split() for line in memory.by_leaf_table().splitlines()]
    assert lines[0] == "shape rows columns parameters state bytes bytes/param".split()
    assert {line[0]: line[1:-2] for line in lines[1:]} == {
        "experts": ["2×32×64", "2×32", "2×64", "4,096"],
        "q_einsum": ["4×32×16", "32", "4×16", "2,048"],
        "query": ["32×4×16", "32", "4×16", "2,048"],
        "bias": ["4×16", "64"],
        "(other)": [],
        "total": ["8,256"],
    }
    for name, *_, size, _ in lines[1:-2]:
        assert size == f"{memory.by_leaf[name]:,}"


@pytest.mark.parametrize("mu_dtype", ["float32", "int8", "int4"])
def test_all_of_a_leaf_is_found(mu_dtype):
    params = [shapes((64, 64)), {"values": shapes((128, 64))}]
    memory = state_memory(came(1e-3, mu_dtype=mu_dtype), params)
    alone = state_memory(came(1e-3, mu_dtype=mu_dtype), {"row_scale": params[0]})
    assert memory.by_leaf["(other)"] == alone.by_leaf["(other)"] <= 8
    assert memory.by_leaf["0"] == alone.by_leaf["row_scale"]
    assert sum(memory.by_leaf.values()) == memory.total

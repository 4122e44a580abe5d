"""Bytes of optimizer state, counted before they are allocated."""

import re

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from measuring.zoo import abstract_params

from came_optax import (
    BalancedSplit,
    ByPath,
    FactoredAxes,
    LargestTwoAxes,
    LastTwoAxes,
    Stacked,
    came,
    state_memory,
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


@pytest.mark.parametrize("model", ["bert-base", "gpt2"])
@pytest.mark.parametrize(("mu_dtype", "most"), [("int8", 1.05), ("int4", 0.55)])
def test_narrow_momentum_of_large_models(model, mu_dtype, most):
    memory = state_memory(came(1e-3, mu_dtype=mu_dtype), abstract_params(model))
    assert memory.bytes_per_param <= most
    assert memory.adamw / memory.num_params == pytest.approx(8)


def test_flax_parameters():
    model = nnx.eval_shape(lambda: nnx.Linear(64, 64, rngs=nnx.Rngs(0)))
    memory = state_memory(came(1e-3), nnx.state(model, nnx.Param))
    assert memory.num_params == 64 * 65
    assert set(memory.by_module) == {"kernel", "bias", "(other)"}


def test_prints_an_aligned_table():
    lines = str(state_memory(came(1e-3), PARAMS)).splitlines()
    assert lines[0].split() == ["parameters", "state", "bytes", "bytes/param"]
    heads = "parameters", "state bytes", "bytes/param"
    ends = [lines[0].index(head) + len(head) for head in heads]
    for line in lines[1:]:
        numbers = re.finditer(r"(?<= )[\d,.]+(?= |$)", line)
        found = [match.end() for match in numbers]
        assert found in (ends, ends[1:2]), line
    assert [line.split()[0] for line in lines[1:5]] == [
        "embed",
        "layer",
        "(other)",
        "total",
    ]
    assert lines[-1].startswith("AdamW")


def shapes(tree):
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        tree,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def scanned(axis, layers=8, d=256, heads=4):
    """Layers stacked on one axis, and what isn't: axis 1 is MaxText's."""
    layer = {
        "attention": {
            "query": (d, heads, d // heads),
            "out": (heads, d // heads, d),
        },
        "mlp": {"wi": (d, 4 * d), "wo": (4 * d, d)},
        "norm": (d,),
    }

    def stack(shape):
        return (*shape[:axis], layers, *shape[axis:])

    layer = jax.tree.map(stack, layer, is_leaf=lambda x: isinstance(x, tuple))
    embeddings = {"token": (512, d), "position": (128, d)}
    return shapes(
        {
            "params": {
                "embeddings": embeddings,
                "decoder": {"layers": layer},
                "norm": (d,),
            }
        }
    )


WHERE = "^params/decoder/layers/"


@pytest.mark.parametrize(
    ("axis", "mu_dtype"),
    [(0, "int8"), (0, "int4"), (1, "bfloat16"), (1, "int8"), (1, "int4")],
)
def test_says_with_which_rules_the_state_is_smaller(axis, mu_dtype):
    params = scanned(axis)
    memory = state_memory(came(1e-3, mu_dtype=mu_dtype), params)
    assert list(memory.smaller) == [
        Stacked(BalancedSplit(), axis, WHERE),
        BalancedSplit(),
    ]
    for rule, total in memory.smaller.items():
        tx = came(1e-3, mu_dtype=mu_dtype, factoring=rule)
        assert state_memory(tx, params).total == total < 0.9 * memory.total
        assert not state_memory(tx, params).smaller
    *_, stacked, balanced = str(memory).splitlines()
    assert re.fullmatch(
        rf"\d\.\d{{3}} bytes/param with factoring=Stacked\(.*axis={axis}, .*\), "
        rf"if axis {axis} there stacks layers",
        stacked,
    )
    assert balanced.endswith("bytes/param with factoring=BalancedSplit()")


def test_several_stacks_have_one_rule():
    params = scanned(1)
    params["params"]["encoder"] = params["params"]["decoder"]
    rules = state_memory(came(1e-3, mu_dtype="int4"), params).smaller
    where = "^(params/decoder/layers|params/encoder/layers)/"
    assert Stacked(BalancedSplit(), 1, where) in rules
    (only_layers,) = jax.tree.leaves(
        scanned(1)["params"]["decoder"], is_leaf=lambda x: "mlp" in x
    )
    rules = state_memory(came(1e-3, mu_dtype="int4"), only_layers).smaller
    assert Stacked(BalancedSplit(), 1, "") in rules


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx),
        lambda tx: optax.masked(tx, {"params": {**MASK, "embeddings": False}}),
        lambda tx: optax.apply_if_finite(tx, 3),
    ],
)
def test_smaller_rules_of_wrapped_optimizers(wrap):
    params = scanned(1)
    (rule, total), *_ = state_memory(
        wrap(came(1e-3, mu_dtype="int4")), params
    ).smaller.items()
    assert rule == Stacked(BalancedSplit(), 1, WHERE)
    tx = wrap(came(1e-3, mu_dtype="int4", factoring=rule))
    assert total == state_memory(tx, params).total


MASK = {"decoder": True, "norm": True}


@pytest.mark.parametrize(
    ("tx", "params"),
    [
        (came(1e-3, mu_dtype="int4"), abstract_params("gpt2")),
        (came(1e-3), scanned(1, layers=32, d=1024)),  # Less than a tenth.
        (optax.adamw(1e-3), scanned(1)),
        (optax.adafactor(1e-3, min_dim_size_to_factor=1), scanned(1)),
        (came(1e-3, mu_dtype="int4"), shapes({"a": (3,), "b": ()})),
        (came(1e-3, mu_dtype="int4"), {}),
    ],
    ids=["gpt2", "float32", "adamw", "adafactor", "vectors", "nothing"],
)
def test_says_nothing_where_no_rule_saves_a_tenth(tx, params):
    memory = state_memory(tx, params)
    assert not memory.smaller
    assert "factoring" not in str(memory)


def test_small_leaves_left_whole_are_seen():
    memory = state_memory(
        came(1e-3, mu_dtype="int8", factoring=LargestTwoAxes()),
        shapes({"kernel": (4096, 64)}),
    )
    assert list(memory.smaller) == [BalancedSplit()]


@pytest.mark.parametrize(
    ("params", "traces"), [(abstract_params("gpt2"), 1), (scanned(1), 3)]
)
def test_nothing_is_tried_where_nothing_can_be_saved(params, traces):
    tx, calls = came(1e-3, mu_dtype="int8"), []

    def init(params):
        calls.append(params)
        return tx.init(params)

    state_memory(optax.GradientTransformation(init, tx.update), params)
    assert len(calls) == traces


def test_trying_rules_leaves_no_trace():
    tx = came(1e-3, mu_dtype="int4")
    jitted = optax.GradientTransformation(jax.jit(tx.init), tx.update)
    params = scanned(1)
    expected = jax.eval_shape(lambda p: tx.init(p), params)
    for optimizer in (tx, jitted):
        assert state_memory(optimizer, params).total
        assert jax.eval_shape(optimizer.init, params) == expected
        assert jax.eval_shape(lambda p: optimizer.init(p), params) == expected  # noqa: B023


def test_table_of_leaves():
    params = shapes(
        {
            "q_einsum": (4, 32, 16),
            "query": (32, 4, 16),
            "experts": (2, 32, 64),
            "bias": (4, 16),
        }
    )
    rule = ByPath(
        {
            "q_einsum": FactoredAxes((1,), (0, 2)),
            "bias": FactoredAxes(),
            "experts": LastTwoAxes(),
        },
        default=BalancedSplit(),
    )
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

"""Haliax's named arrays: statistics have the names of the axes that they have."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from came_optax import BalancedSplit, Stacked, came, steady_came

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    hax = pytest.importorskip("haliax")

# Haliax itself looks there for a mesh.
pytestmark = pytest.mark.filterwarnings("ignore:jax.interpreters.pxla.thread_resources")

LAYERS, EMBED, HEADS, HEAD_SIZE, ONE = hax.make_axes(
    layers=3, embed=64, heads=4, head_size=32, one=1
)
MAPPING = {"embed": "fsdp", "heads": "tensor"}


def make_model():
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        "layers": {
            "query": hax.random.normal(keys[0], (LAYERS, EMBED, HEADS, HEAD_SIZE)),
            "scale": hax.random.normal(keys[1], (LAYERS, EMBED)),
        },
        "bias": hax.random.normal(keys[2], (EMBED,)),
        "temperature": hax.named(jnp.ones([]), ()),
        "one": hax.ones(ONE),
    }


RULE = Stacked(BalancedSplit(), where="layers/")


@pytest.mark.parametrize("mu_dtype", ["float32", "int8", "int4"])
def test_statistics_are_named(mu_dtype):
    state, *_ = came(1e-3, factoring=RULE, mu_dtype=mu_dtype).init(make_model())
    query = {
        name: getattr(state, name)["layers"]["query"] for name in state._fields[1:]
    }
    assert query["v_row"].axes == query["s_row"].axes == (LAYERS, EMBED)
    assert query["v_col"].axes == query["s_col"].axes == (LAYERS, HEADS, HEAD_SIZE)
    assert isinstance(query["v"], jax.Array)
    assert state.v["layers"]["scale"].axes == (LAYERS, EMBED)
    assert state.v["temperature"].axes == ()
    mu = query["mu"]
    if mu_dtype == "float32":
        assert mu.axes == (LAYERS, EMBED, HEADS, HEAD_SIZE)
    else:
        assert mu.row_scale.axes == (LAYERS, EMBED)
        assert [axis.name for axis in mu.values.axes] == [
            "layers",
            "embed",
            "heads",
            "head_size",
        ]
    for leaf in jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, "axes")):
        if hasattr(leaf, "axes"):
            assert leaf.array.shape == tuple(axis.size for axis in leaf.axes)


@pytest.mark.slow(but=1)
@pytest.mark.parametrize("mu_dtype", ["float32", "int4"])
def test_updates_are_those_of_bare_arrays(mu_dtype):
    tx = steady_came(1e-3, weight_decay=0.1, factoring=RULE, mu_dtype=mu_dtype)
    named = make_model()
    bare = jax.tree.map(lambda x: x.array, named, is_leaf=lambda x: hasattr(x, "axes"))
    states = [tx.init(params) for params in (named, bare)]
    for _ in range(3):
        updates, states[0] = tx.update(named, states[0], named)
        expected, states[1] = tx.update(bare, states[1], bare)
        assert jax.tree.structure(updates) == jax.tree.structure(named)
        for x, y in zip(
            jax.tree.leaves(updates), jax.tree.leaves(expected), strict=True
        ):
            np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("mu_dtype", ["float32", "int8"])
def test_named_jit_places_the_state(mu_dtype):
    tx = came(1e-3, factoring=RULE, mu_dtype=mu_dtype)
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    with jax.set_mesh(mesh), hax.axis_mapping(MAPPING):
        model = hax.named_jit(make_model, out_axis_resources=MAPPING)()
        state = hax.named_jit(tx.init, out_axis_resources=MAPPING)(model)

        @functools.partial(hax.named_jit, axis_resources=MAPPING)
        def update(model, state):
            updates, state = tx.update(model, state, model)
            return optax.apply_updates(model, updates), state

        model, state = update(model, state)
        model, state = update(model, state)
    query = {
        name: getattr(state[0], name)["layers"]["query"] for name in ("v_row", "v_col")
    }
    assert query["v_row"].array.sharding.spec == P(None, "fsdp")
    assert query["v_col"].array.sharding.spec == P(None, "tensor", None)

"""Haliax's named arrays: statistics have the names of the axes that they have."""

import functools
import warnings

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from came_optax import BalancedSplit, Stacked, came

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
    fields = state._fields[1:]
    query = {name: getattr(state, name)["layers"]["query"] for name in fields}
    assert query["v_row"].axes == query["s_row"].axes == (LAYERS, EMBED)
    assert query["v_col"].axes == query["s_col"].axes == (LAYERS, HEADS, HEAD_SIZE)
    assert isinstance(query["v"], jax.Array)
    assert state.v["layers"]["scale"].axes == (LAYERS, EMBED)
    assert state.v["temperature"].axes == ()
    values = query["mu"]
    if mu_dtype != "float32":
        assert values.row_scale.axes == (LAYERS, EMBED)
        values = values.values
    names = [axis.name for axis in values.axes]
    assert names == ["layers", "embed", "heads", "head_size"]
    for leaf in jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, "axes")):
        if hasattr(leaf, "axes"):
            assert leaf.array.shape == tuple(axis.size for axis in leaf.axes)


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

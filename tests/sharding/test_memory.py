"""What of the state each device holds, and in which memory."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from came_optax import came, state_sharding

# Experts, heads or layers, rows, columns, both; odd vocabularies.
ALL = "fsdp", "tp"
SHARDED = {
    (8, 64, 96): [P(ALL), P(None, ALL), P(None, None, ALL), P(None, "fsdp", "tp")],
    (64, 8, 32): [P(ALL), P(None, ALL), P("fsdp", "tp")],
    (8, 1023, 33): [P(ALL)],
    (1031, 128): [P(None, ALL)],
    (2048, 40): [P(ALL), P(None, ALL), P("fsdp", "tp")],
    (8, 1024): [P(ALL), P(None, ALL)],
    (24, 4096): [P(ALL), P(None, "fsdp")],
    (4096,): [P(ALL)],
}


def fsdp_and_tp(explicit):
    kind = AxisType.Explicit if explicit else AxisType.Auto
    return jax.make_mesh((4, 2), ALL, axis_types=(kind,) * 2)


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("shape", SHARDED, ids=str)
def test_four_bits_take_no_more_of_a_device_than_eight(shape, explicit):
    mesh = fsdp_and_tp(explicit)

    def bytes_of_a_device(mu_dtype, sharding):
        params = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)
        tx = came(1e-3, mu_dtype=mu_dtype)
        codes = optax.tree.get(jax.eval_shape(tx.init, params), "mu").values
        place = codes.sharding
        if not explicit:
            state = state_sharding(tx, params, sharding)
            place = optax.tree.get(state, "mu").values
        return math.prod(place.shard_shape(codes.shape)) * codes.dtype.itemsize

    with jax.set_mesh(mesh):
        for spec in SHARDED[shape]:
            four, eight = (
                bytes_of_a_device(mu_dtype, NamedSharding(mesh, spec))
                for mu_dtype in ("int4", "int8")
            )
            assert four <= 0.52 * eight + 8, spec


@pytest.mark.slow(but=1)
@pytest.mark.skipif(
    jax.__version_info__ < (0, 10),
    reason="the XLA of jax 0.8.1 refuses scalars beside arrays in host memory",
)
@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("mu_dtype", ["float32", "int8"])
def test_offloaded_parameters_have_their_state_beside_them(mu_dtype, explicit):
    mesh = fsdp_and_tp(explicit)
    on_host = NamedSharding(mesh, P("fsdp", "tp"), memory_kind="pinned_host")
    shardings = {"host": on_host, "device": NamedSharding(mesh, P("fsdp"))}
    params = {name: jnp.ones((64, 64)) for name in shardings}
    tx = came(1e-3, mu_dtype=mu_dtype)
    place = state_sharding(tx, params, shardings)
    kinds = jax.tree.map(lambda s: s.memory_kind, place)
    for path, kind in jax.tree.leaves_with_path(kinds):
        is_host = "host" in jax.tree_util.keystr(path)
        assert kind == ("pinned_host" if is_host else "device"), path
    alone = state_sharding(tx, params["host"], on_host)
    assert optax.tree.get(alone, "s_row").memory_kind == "pinned_host"

    def to_device(x, sharding):
        if sharding.memory_kind != "pinned_host":
            return x
        return jax.device_put(x, sharding.with_memory_kind("device"))

    @functools.partial(jax.jit, out_shardings=(None, place))
    def step(params, state):
        params = jax.tree.map(to_device, params, shardings)
        return tx.update(params, jax.tree.map(to_device, state, place), params)

    with jax.set_mesh(mesh):
        laid = jax.device_put(params, shardings)
        state = jax.jit(tx.init, out_shardings=place)(laid)
        updates, state = step(laid, state)
    assert jax.tree.map(lambda x: x.sharding.memory_kind, state) == kinds
    expected, _ = jax.jit(tx.update)(params, tx.init(params), params)
    chex.assert_trees_all_close(jax.device_get(updates), expected, rtol=1e-5)

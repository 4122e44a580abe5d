"""What came_muon and orthogonalize are told of the parameters' shardings."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from came_optax import came_muon, orthogonalize


def test_on_auto_axes_init_warns_that_it_has_to_be_told(auto_mesh, explicit_mesh):
    params = {"up": {"kernel": jnp.ones((16, 32))}, "bias": jnp.ones(32)}
    specs = {"up": {"kernel": P("fsdp")}, "bias": P()}

    def on(mesh):
        shardings = jax.tree.map(functools.partial(NamedSharding, mesh), specs)
        return jax.device_put(params, shardings), shardings

    sharded, shardings = on(auto_mesh(fsdp=8))
    for init in came_muon(1e-2).init, jax.jit(came_muon(1e-2).init):
        with (
            jax.set_mesh(auto_mesh(fsdp=8)),
            pytest.warns(match="mesh of Auto axes, and params_sharding isn't given"),
        ):
            init(sharded)
    with pytest.warns(match="params_sharding isn't given"):
        came_muon(1e-2).init(sharded)
    # Warnings are errors.
    came_muon(1e-2, params_sharding=shardings).init(sharded)
    came_muon(1e-2).init(params)
    came_muon(1e-2).init(on(explicit_mesh(fsdp=8))[0])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"up": P("fsdp")}, "params_sharding has nothing for leaf 'down'"),
        (
            P("fsdp"),
            r"PartitionSpecs needs a mesh: enter one with jax.set_mesh\(mesh\)",
        ),
    ],
)
def test_too_little_is_refused(given, message):
    grads = {"up": jnp.ones((16, 32)), "down": jnp.ones((32, 16))}
    tx = orthogonalize(params_sharding=given)
    state = tx.init(grads)
    with pytest.raises(ValueError, match=message):
        tx.update(grads, state)

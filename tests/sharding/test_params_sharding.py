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


GRADS = {"up": jnp.ones((16, 32)), "down": jnp.ones((32, 16))}


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"up": P("fsdp")}, ValueError, "has nothing for leaf 'down'"),
        ({"up": P(), "down": None}, ValueError, "has nothing for leaf 'down'"),
        ({"up": P(), "down": "fsdp"}, TypeError, "at 'down' is 'fsdp'; allowed are"),
        (P("fsdp", None, None), ValueError, r"at 'down' is .* shape \(32, 16\)"),
    ],
)
@pytest.mark.parametrize("make", [orthogonalize, functools.partial(came_muon, 1e-2)])
def test_shardings_that_do_not_fit_are_refused(make, given, error, message):
    with pytest.raises(error, match=f"params_sharding .*{message}"):
        make(params_sharding=given).init(GRADS)


def test_shardings_on_two_meshes_are_refused(auto_mesh):
    meshes = auto_mesh(fsdp=8), auto_mesh(fsdp=4, tensor=2)
    given = {
        name: NamedSharding(mesh, P("fsdp"))
        for name, mesh in zip(GRADS, meshes, strict=True)
    }
    with pytest.raises(ValueError, match="params_sharding names 2 meshes"):
        orthogonalize(params_sharding=given).init(GRADS)


def test_specs_without_a_mesh_are_refused():
    tx = orthogonalize(params_sharding=P("fsdp"))
    state = tx.init(GRADS)
    message = r"PartitionSpecs needs a mesh: enter one with jax.set_mesh\(mesh\)"
    with pytest.raises(ValueError, match=message):
        tx.update(GRADS, state)

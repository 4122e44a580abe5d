"""Restore an NNX model and its optimizer onto a mesh with Orbax, bit for bit.

To see it on one CPU: XLA_FLAGS=--xla_force_host_platform_device_count=8
"""

import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from came_optax import steady_came


def mesh_of(devices):
    return jax.make_mesh(
        (len(devices),), ("fsdp",), axis_types=(AxisType.Auto,), devices=devices
    )


def create():
    init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("fsdp", None))
    model = nnx.Linear(256, 128, kernel_init=init, rngs=nnx.Rngs(0))
    tx = steady_came(1e-2, mu_dtype="int8")
    return model, nnx.Optimizer(model, tx, wrt=nnx.Param)


@nnx.jit
def train_step(model, optimizer, x):
    grads = nnx.grad(lambda model: jnp.mean(model(x) ** 2))(model)
    optimizer.update(model, grads)


def restore(checkpointer, path, mesh):
    with jax.set_mesh(mesh):
        graph, shapes = nnx.split(nnx.eval_shape(create))  # No array is made.
    like = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        nnx.get_named_sharding(shapes, mesh),
    )
    return nnx.merge(graph, checkpointer.restore(path, like))


mesh = mesh_of(jax.devices())
with jax.set_mesh(mesh):
    model, optimizer = nnx.jit(create)()
    train_step(model, optimizer, jnp.ones((64, 256)))

half = mesh_of(jax.devices()[: max(1, jax.device_count() // 2)])
with (
    tempfile.TemporaryDirectory() as folder,
    ocp.StandardCheckpointer() as checkpointer,
):
    path = Path(folder) / "step_1"
    checkpointer.save(path, nnx.state((model, optimizer)))
    checkpointer.wait_until_finished()
    # Onto half of the devices, as if the others were gone.
    new_model, new_optimizer = restore(checkpointer, path, half)

print(new_model.kernel[...].sharding)

# The tests hold this.
saved, restored = nnx.state((model, optimizer)), nnx.state((new_model, new_optimizer))
assert jax.tree.structure(restored) == jax.tree.structure(saved)
on_host = jax.device_get((restored, saved))  # The two meshes differ.
assert jax.tree.all(jax.tree.map(jnp.array_equal, *on_host))
for name, spec in {
    "values": P("fsdp"),
    "row_scale": P("fsdp"),
    "col_scale": P(),
}.items():
    x = optax.tree.get(restored, name)[...]
    assert x.sharding.is_equivalent_to(NamedSharding(half, spec), x.ndim), name
with jax.set_mesh(half):
    train_step(new_model, new_optimizer, jnp.ones((64, 256)))
assert new_optimizer.step[...] == 2

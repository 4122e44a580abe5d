"""Keep the optimizer's state in the host's memory between steps.

To see it on one CPU: XLA_FLAGS=--xla_force_host_platform_device_count=8
"""

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from came_optax import state_sharding, steady_came

mesh = jax.make_mesh((jax.device_count(),), ("fsdp",), axis_types=(AxisType.Auto,))
params_sharding = NamedSharding(mesh, P("fsdp"))
params = jax.device_put({"kernel": jnp.ones((64, 128))}, params_sharding)
optimizer = steady_came(1e-3, mu_dtype="int8")
on_device, on_host = (
    state_sharding(optimizer, params, params_sharding.with_memory_kind(kind))
    for kind in ("device", "pinned_host")
)
state = jax.jit(optimizer.init, out_shardings=on_host)(params)


@jax.jit(out_shardings=(params_sharding, on_host), donate_argnums=(0, 1))
def train_step(params, state, x):
    grads = jax.grad(lambda params: jnp.mean((x @ params["kernel"]) ** 2))(params)
    state = jax.device_put(state, on_device)
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state


params, state = train_step(params, state, jnp.ones((32, 64)))
for path, x in jax.tree.leaves_with_path(state):
    print(jax.tree_util.keystr(path), x.shape, x.sharding.memory_kind)

# The tests hold this.
for path, x in jax.tree.leaves_with_path(state):
    expected = "device" if x.ndim == 0 else "pinned_host"  # All but the counter.
    assert x.sharding.memory_kind == expected, path
assert optax.tree.get(state, "mu")["kernel"].values.sharding.spec == P("fsdp")
assert not jnp.array_equal(params["kernel"], jnp.ones((64, 128)))

"""Fully sharded data parallelism: parameters and state live in pieces on all devices.

To see it on one CPU: XLA_FLAGS=--xla_force_host_platform_device_count=8
"""

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from came_optax import state_sharding, steady_came

mesh = jax.make_mesh((jax.device_count(),), ("fsdp",), axis_types=(AxisType.Auto,))
tx = steady_came(1e-3)


def init_params():
    return {"kernel": jnp.ones((1024, 512)), "bias": jnp.zeros(512)}


params_sharding = {
    "kernel": NamedSharding(mesh, P("fsdp")),
    "bias": NamedSharding(mesh, P()),
}
abstract = jax.eval_shape(init_params)
shardings = (params_sharding, state_sharding(tx, abstract, params_sharding))


def init():
    params = init_params()
    return params, tx.init(params)


@jax.jit(out_shardings=shardings, donate_argnums=(0, 1))
def train_step(params, state, x):
    def loss_fn(params):
        return jnp.mean((x @ params["kernel"] + params["bias"][None]) ** 2)

    updates, state = tx.update(jax.grad(loss_fn)(params), state, params)
    return optax.apply_updates(params, updates), state


params, state = jax.jit(init, out_shardings=shardings)()  # Never whole on one device.
x = jax.device_put(jnp.ones((64, 1024)), NamedSharding(mesh, P("fsdp")))
params, state = train_step(params, state, x)
for name in "mu", "v_row":
    array = optax.tree.get(state, name)["kernel"]
    print(name, array.shape, array.sharding.spec)

# The tests hold this.
for name in "mu", "v_row":
    assert optax.tree.get(state, name)["kernel"].sharding.spec == P("fsdp")

"""Change the learning rate of a running optimizer, without recompiling."""

import jax
import jax.numpy as jnp
import optax

from came_optax import steady_came

params = {"kernel": jnp.ones((16, 8))}
grads = {"kernel": jnp.ones((16, 8))}


def is_kernel(params):
    return jax.tree.map_with_path(lambda path, _: path[-1].key == "kernel", params)


injected = optax.inject_hyperparams(steady_came, static_args="weight_decay_mask")
tx = injected(learning_rate=1e-2, weight_decay=0.1, weight_decay_mask=is_kernel)
state = tx.init(params)
update = jax.jit(tx.update)

before, state = update(grads, state, params)
state.hyperparams["learning_rate"] = jnp.asarray(1e-3, jnp.float32)
after, state = update(grads, state, params)
print(before["kernel"][0, 0], after["kernel"][0, 0])

# The tests hold this.
assert update._cache_size() == 1
assert jnp.abs(after["kernel"]).max() < jnp.abs(before["kernel"]).max() / 5

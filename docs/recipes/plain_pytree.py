"""CAME on a plain pytree of arrays, as any Optax optimizer."""

import jax
import jax.numpy as jnp
import optax

from came_optax import steady_came

params = {"kernel": jnp.zeros((64, 8)), "bias": jnp.zeros(8)}
tx = steady_came(optax.warmup_cosine_decay_schedule(0.0, 1e-2, 10, 100))
state = tx.init(params)


def loss_fn(params, x, y):
    return jnp.mean((x @ params["kernel"] + params["bias"][None] - y) ** 2)


@jax.jit
def train_step(params, state, x, y):
    loss, grads = jax.value_and_grad(loss_fn)(params, x, y)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss


x = jax.random.normal(jax.random.key(0), (32, 64))
for _ in range(100):
    params, state, loss = train_step(params, state, x, x[:, :8])
print(f"loss {loss:.3f}")

# The tests hold this.
assert loss < 0.5

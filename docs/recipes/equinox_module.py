"""CAME in Equinox: the arrays of a module are a pytree as any other."""

import equinox as eqx
import jax
import jax.numpy as jnp

from came_optax import steady_came

model = eqx.nn.Linear(64, 8, key=jax.random.key(1))
tx = steady_came(1e-2)
state = tx.init(eqx.filter(model, eqx.is_inexact_array))


@eqx.filter_jit
def train_step(model, state, x, y):
    def loss_fn(model):
        return jnp.mean((jax.vmap(model)(x) - y) ** 2)

    loss, grads = eqx.filter_value_and_grad(loss_fn)(model)
    params = eqx.filter(model, eqx.is_inexact_array)
    updates, state = tx.update(grads, state, params)
    return eqx.apply_updates(model, updates), state, loss


x = jax.random.normal(jax.random.key(0), (32, 64))
for _ in range(100):
    model, state, loss = train_step(model, state, x, x[:, :8])
print(f"loss {loss:.3f}")

# The tests hold this.
assert loss < 0.5

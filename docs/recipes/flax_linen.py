"""CAME in Flax Linen: give it to `TrainState`."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.training.train_state import TrainState

from came_optax import steady_came

model = nn.Dense(8)
x = jax.random.normal(jax.random.key(0), (32, 64))
state = TrainState.create(
    apply_fn=model.apply,
    params=model.init(jax.random.key(1), x)["params"],
    tx=steady_came(1e-2),
)


@jax.jit
def train_step(state, x, y):
    def loss_fn(params):
        return jnp.mean((state.apply_fn({"params": params}, x) - y) ** 2)

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    return state.apply_gradients(grads=grads), loss


for _ in range(100):
    state, loss = train_step(state, x, x[:, :8])
print(f"loss {loss:.3f}")

# The tests hold this.
assert loss < 0.5

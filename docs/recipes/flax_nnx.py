"""CAME in Flax NNX: give it to `nnx.Optimizer`."""

import jax
import jax.numpy as jnp
from flax import nnx

from came_optax import steady_came

model = nnx.Linear(64, 8, rngs=nnx.Rngs(0))
optimizer = nnx.Optimizer(model, steady_came(1e-2), wrt=nnx.Param)


@nnx.jit
def train_step(model, optimizer, x, y):
    loss, grads = nnx.value_and_grad(lambda m: jnp.mean((m(x) - y) ** 2))(model)
    optimizer.update(model, grads)
    return loss


x = jax.random.normal(jax.random.key(0), (32, 64))
for _ in range(100):
    loss = train_step(model, optimizer, x, x[:, :8])
print(f"loss {loss:.3f}")

# The tests hold this.
assert loss < 0.5

"""Log the confidence and the size of updates to TensorBoard.

The instability's square root is what CAME divides the momentum by. Where it is small,
updates agree with their momentum and steps are large.
"""

import tempfile

import jax
import jax.numpy as jnp
import optax
import tensorboardX

from came_optax import steady_came

params = {"kernel": jnp.zeros((64, 8)), "bias": jnp.zeros(8)}
learning_rate = 1e-2
tx = steady_came(learning_rate)
state = tx.init(params)


@jax.jit
def train_step(params, state, x, y):
    def loss_fn(params):
        return jnp.mean((x @ params["kernel"] + params["bias"][None] - y) ** 2)

    updates, state = tx.update(jax.grad(loss_fn)(params), state, params)
    metrics = {
        # Factored leaves only: others hold a zero here.
        "confidence/kernel": jax.lax.rsqrt(
            optax.tree.get(state, "s_row")["kernel"].mean()
        ),
        **{
            f"update_rms/{name}": jnp.sqrt(jnp.mean(u**2)) / learning_rate
            for name, u in updates.items()
        },
    }
    return optax.apply_updates(params, updates), state, metrics


x = jax.random.normal(jax.random.key(0), (32, 64))
with tempfile.TemporaryDirectory() as folder:
    with tensorboardX.SummaryWriter(folder) as writer:
        for step in range(20):
            params, state, metrics = train_step(params, state, x, x[:, :8])
            for name, value in metrics.items():
                writer.add_scalar(name, value, step)
print({name: round(float(value), 3) for name, value in metrics.items()})

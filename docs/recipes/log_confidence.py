"""Log the confidence and the size of updates to TensorBoard.

CAME divides the momentum by the instability's square root. Where that is small, updates
agree with their momentum and steps are large.
"""

import tempfile

import jax
import jax.numpy as jnp
import optax
import tensorboardX

from came_optax import steady_came

params = {"dense": {"kernel": jnp.zeros((64, 8)), "bias": jnp.zeros(8)}}
learning_rate, b3 = 1e-2, 0.9999
tx = steady_came(learning_rate, b3=b3)
state = tx.init(params)


def by_name(tree):
    """The leaves of any tree, each named by its path, such as "dense/kernel"."""
    for path, leaf in jax.tree.leaves_with_path(tree):
        yield jax.tree_util.keystr(path, simple=True, separator="/"), leaf


@jax.jit
def train_step(params, state, x, y):
    def loss_fn(params):
        dense = params["dense"]
        return jnp.mean((x @ dense["kernel"] + dense["bias"][None] - y) ** 2)

    updates, state = tx.update(jax.grad(loss_fn)(params), state, params)
    came_state = optax.tree.get(state, "ScaleByCameState")
    seen = 1 - b3**came_state.count  # The average began at zero; came ignores that.
    metrics = {
        f"update_rms/{name}": jnp.sqrt(jnp.mean(u**2)) / learning_rate
        for name, u in by_name(updates)
    }
    metrics |= {
        f"confidence/{name}": jax.lax.rsqrt(s_row.mean() / seen)
        for name, s_row in by_name(came_state.s_row)
        if s_row.size > 1  # Leaves that aren't factored hold one zero here.
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

# The tests hold this.
assert 0.5 < metrics["confidence/dense/kernel"] < 0.1**-0.5  # The root of eps2 bounds.
assert "confidence/dense/bias" not in metrics
assert all(0 < metrics[f"update_rms/dense/{name}"] < 3.2 for name in params["dense"])

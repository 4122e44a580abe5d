"""Save and restore parameters and optimizer state with Orbax, bit for bit."""

import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp

from came_optax import steady_came

params = {"kernel": jnp.ones((16, 8)), "bias": jnp.ones(8)}
tx = steady_came(1e-2)
updates, state = tx.update(params, tx.init(params), params)
training = {"params": optax.apply_updates(params, updates), "opt_state": state}

with (
    tempfile.TemporaryDirectory() as folder,
    ocp.StandardCheckpointer() as checkpointer,
):
    path = Path(folder) / "step_1"
    checkpointer.save(path, training)
    checkpointer.wait_until_finished()
    # Restoring into `like` gives the state its types back: without it Orbax returns
    # dicts and lists, which no optimizer takes.
    like = jax.eval_shape(lambda: {"params": params, "opt_state": tx.init(params)})
    restored = checkpointer.restore(path, like)

# The tests hold this.
assert jax.tree.structure(restored) == jax.tree.structure(training)
assert jax.tree.all(jax.tree.map(jnp.array_equal, restored, training))

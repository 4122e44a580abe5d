"""AdamW for embeddings and vectors, CAME for the matrices."""

import jax
import jax.numpy as jnp
import optax

from came_optax import steady_came

params = {
    "embedding": jnp.ones((100, 16)),
    "dense": {"kernel": jnp.ones((16, 16)), "bias": jnp.ones(16)},
}


def label(path, leaf):
    return "came" if leaf.ndim == 2 and path[0].key != "embedding" else "adamw"


tx = optax.partition(
    {"came": steady_came(1e-3), "adamw": optax.adamw(1e-3)},
    lambda params: jax.tree.map_with_path(label, params),
)
state = tx.init(params)
updates, state = jax.jit(tx.update)(params, state, params)
params = optax.apply_updates(params, updates)

# The tests hold this.
assert optax.tree.get(state, "v_row")["dense"]["kernel"].shape == (16,)
assert optax.tree.get(state, "nu")["embedding"].shape == (100, 16)

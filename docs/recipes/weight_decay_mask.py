"""Decay kernels only: no biases, norms or embeddings."""

import jax
import jax.numpy as jnp

from came_optax import steady_came

params = {
    "embedding": jnp.ones((100, 16)),
    "dense": {"kernel": jnp.ones((16, 16)), "bias": jnp.ones(16)},
}


def is_kernel(params):
    return jax.tree.map_with_path(lambda path, _: path[-1].key == "kernel", params)


tx = steady_came(1e-2, weight_decay=0.1, weight_decay_mask=is_kernel)
zeros = jax.tree.map(jnp.zeros_like, params)
updates, _ = tx.update(zeros, tx.init(params), params)

# The tests hold this.
assert jnp.allclose(updates["dense"]["kernel"], -1e-3)  # lr · weight decay · parameter
assert not updates["dense"]["bias"].any() and not updates["embedding"].any()

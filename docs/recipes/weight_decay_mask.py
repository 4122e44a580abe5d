"""Decay kernels only, in plain pytrees, Linen and NNX alike."""

import re

import jax
import jax.numpy as jnp
from flax import nnx

from came_optax import steady_came


def is_kernel(params):
    """Says which leaves decay: by name, as vectors of stacked layers have two axes."""

    def decays(path, _):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return bool(re.search("(^|/)kernel(/value)?$", name))

    return jax.tree.map_with_path(decays, params)


tx = steady_came(1e-2, weight_decay=0.1, weight_decay_mask=is_kernel)

params = {
    "embedding": jnp.ones((100, 16)),
    "layers": {"kernel": jnp.ones((4, 16, 16)), "bias": jnp.ones((4, 16))},
}
zeros = jax.tree.map(jnp.zeros_like, params)
updates, _ = tx.update(zeros, tx.init(params), params)

model = nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(0))
model.query.bias[...] += 1
optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
before = nnx.to_pure_dict(nnx.state(model, nnx.Param))
optimizer.update(model, jax.tree.map(jnp.zeros_like, nnx.state(model, nnx.Param)))
after = nnx.to_pure_dict(nnx.state(model, nnx.Param))

# The tests hold this.
assert jnp.allclose(updates["layers"]["kernel"], -1e-3)  # lr · weight decay · parameter
assert not updates["layers"]["bias"].any() and not updates["embedding"].any()
decayed, kept = (jax.tree.leaves(tree["query"]["bias"])[0] for tree in (after, before))
assert (decayed == kept).all()
for name in ("query", "key", "value", "out"):
    assert jnp.allclose(after[name]["kernel"], before[name]["kernel"] * 0.999)

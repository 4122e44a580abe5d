"""Layers stacked by `jax.lax.scan`: update each as if it stood alone.

`Stacked` marks the axis of layers, so that each has its own clip, and biases, which are
vectors in each layer, aren't taken for matrices.
"""

import jax
import jax.numpy as jnp

from came_optax import LastTwoAxes, Stacked, steady_came

keys = jax.random.split(jax.random.key(0), 3)
layers = {
    "kernel": jax.random.normal(keys[0], (12, 64, 64)),
    "bias": jax.random.normal(keys[1], (12, 64)),
}
params = {"embedding": jax.random.normal(keys[2], (100, 64)), "layers": layers}


def forward(params, tokens):
    def layer(x, weights):
        return jnp.tanh(x @ weights["kernel"] + weights["bias"][None]), None

    x, _ = jax.lax.scan(layer, params["embedding"][tokens], params["layers"])
    return x


tx = steady_came(1e-3, factoring=Stacked(LastTwoAxes(), axis=0, where="^layers/"))
grads = jax.grad(lambda p: forward(p, jnp.arange(8)).sum())(params)
updates, _ = tx.update(grads, tx.init(params), params)

first = {"layers": jax.tree.map(lambda x: x[0], layers)}
first_grads = {"layers": jax.tree.map(lambda x: x[0], grads["layers"])}
tx = steady_came(1e-3)
alone, _ = tx.update(first_grads, tx.init(first), first)
for name in layers:
    assert jnp.allclose(updates["layers"][name][0], alone["layers"][name], rtol=1e-5)

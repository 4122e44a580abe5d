"""Random arrays, the same in each run."""

import jax.numpy as jnp
import numpy as np


def normal(shape, dtype=jnp.float32, seed=0):
    """A normal array."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def normal_tree(shapes, seed=0, dtype=jnp.float32):
    """Random arrays of the shapes in a dict, nested as their paths say."""
    rng, tree = np.random.default_rng(seed), {}
    for path, shape in shapes.items():
        *modules, leaf = path.split("/")
        node = tree
        for module in modules:
            node = node.setdefault(module, {})
        node[leaf] = jnp.asarray(rng.normal(size=shape), dtype)
    return tree

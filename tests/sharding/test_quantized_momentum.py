"""Momentum in 8 and 4 bits on explicit meshes."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from came_optax import BalancedSplit, LastTwoAxes, Stacked, came

SPECS = {
    (64, 64): [P("a", "b"), P(None, "a"), P(("a", "b"))],
    (4096,): [P("a")],
    (8, 1024): [P(("a", "b"))],  # One row a device: pairs of rows are on two.
    (1025, 8): [P(None, ("b", "a"))],
    (4, 32, 64): [P("a", None, "b"), P("b", "a")],
}


def make_params(mesh):
    rng = np.random.default_rng(0)
    return {
        f"{shape} {spec}": jax.device_put(
            rng.normal(size=shape).astype(np.float32), NamedSharding(mesh, spec)
        )
        for shape, several in SPECS.items()
        for spec in several
    }


@pytest.mark.parametrize(
    ("mu_dtype", "rule"),
    [
        pytest.param("int8", LastTwoAxes(), marks=pytest.mark.slow),
        ("int4", Stacked(BalancedSplit(), where=r"\(4, ")),
    ],
    ids=["int8", "int4-stacked"],
)
def test_values_do_not_depend_on_the_mesh(explicit_mesh, mu_dtype, rule):
    params = make_params(explicit_mesh(a=4, b=2))
    tx = came(1e-2, mu_dtype=mu_dtype, factoring=rule)

    @jax.jit
    def two_updates(params):
        _, state = tx.update(params, tx.init(params), params)
        return tx.update(jax.tree.map(jnp.cos, params), state, params)[0]

    updates = two_updates(params)
    alone = jax.tree.map(np.asarray, jax.device_get(params))
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
        expected = two_updates(alone)
    # Sums in another order may move a code to its neighbour, but few of them.
    for x, y in zip(jax.tree.leaves(updates), jax.tree.leaves(expected), strict=True):
        far = np.abs(np.asarray(x) - np.asarray(y)) > 1e-4 * np.abs(y).max()
        assert far.mean() < 1e-3
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, expected)

"""On Explicit axes the types say where the state is, and values are the same."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from came_optax import (
    BalancedSplit,
    LargestTwoAxes,
    LastTwoAxes,
    Stacked,
    came,
    state_sharding,
    with_master_weights,
)

# Each leaf of a shape with each way to shard it over three mesh axes.
SPECS = {
    (): [P()],
    (8,): [P(), P("a"), P(("a", "b", "c"))],
    (8, 16): [
        P(),
        P("a"),
        P(None, "a"),
        P("a", "b"),
        P(("a", "b"), "c"),
        P("c", ("a", "b")),
        P(None, ("a", "b", "c")),
    ],
    (8, 4, 8): [P("a", "b", "c"), P(None, "b"), P(("c", "a"), None, "b")],
}
# From 4096 elements on, momentum may be quantized.
LARGE_SPECS = {
    (4096,): [P("a")],
    (64, 64): [P("a", "b"), P(None, "a"), P(("a", "b"))],
    (8, 1024): [P(("a", "b", "c"))],  # One row a device: pairs of rows are on two.
    (1025, 8): [P(None, ("c", "b", "a"))],
    (4, 32, 64): [P("a", None, ("b", "c")), P("b", "a")],
    (4, 16, 2, 64): [P("a", "b", None, "c"), P(None, ("a", "b"), "c"), P(("b", "a"))],
}
# Slices of three axes: each rule factors others.
STACKED = {"where": r"\(4, "}
RULES = [
    LastTwoAxes(),
    LargestTwoAxes(8),
    BalancedSplit(),
    Stacked(LastTwoAxes(), **STACKED),
    Stacked(LargestTwoAxes(8), **STACKED),
    Stacked(BalancedSplit(), **STACKED),
    Stacked(BalancedSplit(), axis=-1, **STACKED),
]


def sharded_params(mesh, specs_of_shapes=SPECS, seed=None):
    """Ones, or random numbers."""
    values = jnp.ones if seed is None else np.random.default_rng(seed).standard_normal
    return {
        f"{shape} {spec}": jax.device_put(
            jnp.float32(values(shape)), NamedSharding(mesh, spec)
        )
        for shape, specs in specs_of_shapes.items()
        for spec in specs
    }


def types(tree):
    """Dtypes, shapes and shardings, such as "float32[8@a,16]"."""
    return jax.tree.map(lambda x: str(jax.typeof(x)), tree)


@pytest.mark.slow(but=3)
@pytest.mark.parametrize("mu_dtype", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_types_are_stable(explicit_mesh, rule, mu_dtype):
    params = sharded_params(explicit_mesh(a=2, b=2, c=2), SPECS | LARGE_SPECS)
    tx = came(1e-3, weight_decay=0.1, factoring=rule, mu_dtype=mu_dtype)
    state = jax.eval_shape(tx.init, params)
    updates, new_state = jax.eval_shape(tx.update, params, state, params)
    assert types(new_state) == types(state)
    assert types(updates) == types(params)


@pytest.mark.parametrize("jit", [jax.jit, lambda step: step], ids=["jit", "eager"])
def test_compiled_and_eager_arrays_have_those_types(explicit_mesh, jit):
    mesh = explicit_mesh(a=2, b=2, c=2)
    params = dict(list(sharded_params(mesh).items())[:: 2 if jit is jax.jit else 6])
    tx = came(1e-3, weight_decay=0.1)

    def step(params):
        updates, state = tx.update(params, tx.init(params), params)
        return optax.apply_updates(params, updates), state

    new_params, state = jit(step)(params)
    assert types(state) == types(jax.eval_shape(tx.init, params))
    assert types(new_params) == types(params)
    # What the types say is where state_sharding puts the state on an Auto mesh.
    shardings = state_sharding(tx, params, jax.tree.map(lambda p: p.sharding, params))
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True):
        assert x.sharding.is_equivalent_to(y, x.ndim)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mu_dtype", "rule"),
    [
        ("int8", LastTwoAxes()),
        ("int4", Stacked(BalancedSplit(), **STACKED)),
    ],
    ids=["int8", "int4-stacked"],
)
def test_values_in_codes_do_not_depend_on_the_mesh(explicit_mesh, mu_dtype, rule):
    one_spec_each = {shape: specs[:1] for shape, specs in LARGE_SPECS.items()}
    params = sharded_params(explicit_mesh(a=2, b=2, c=2), one_spec_each, seed=0)
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


@pytest.mark.parametrize("bits", [16, 24, 32])
def test_remainders_have_their_parameters_types(explicit_mesh, bits):
    params = optax.tree.cast(sharded_params(explicit_mesh(a=2, b=2, c=2)), jnp.bfloat16)
    tx = with_master_weights(came(1e-3), bits)
    state = jax.eval_shape(tx.init, params)
    if bits > 16:
        for p, r in zip(
            jax.tree.leaves(params), jax.tree.leaves(state.remainder), strict=True
        ):
            assert jax.typeof(p).sharding == jax.typeof(r).sharding
    updates, new = jax.eval_shape(tx.update, params, state, params)
    # Of what isn't sharded jax 0.8 writes the spec in several ways.
    for before, after in ((state, new), (params, updates)):
        for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
            specs = [
                getattr(s, "spec", ()) for s in (jax.typeof(x).sharding, y.sharding)
            ]
            padded = [(*spec, *(None,) * (x.ndim - len(spec))) for spec in specs]
            assert padded[0] == padded[1]

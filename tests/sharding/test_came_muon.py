"""Orthogonalisation shared by the devices of a mesh, and boxes of other libraries."""

import warnings

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from came_optax import (
    BalancedSplit,
    LastTwoAxes,
    Stacked,
    came_muon,
    orthogonalize,
    state_sharding,
)
from compiling.collectives import collectives

# A leaf's shape, and its spec, on axes of sizes 4 and 2.
LEAVES = {
    "up": ((16, 24), P("fsdp", "tensor")),
    "up again": ((16, 24), P("fsdp", "tensor")),
    "up elsewhere": ((16, 24), P(None, "fsdp")),
    "down": ((24, 16), P("tensor", "fsdp")),
    "query": ((16, 4, 4), P("fsdp", "tensor")),
    "output": ((4, 4, 16), P("tensor", None, "fsdp")),
    "square": ((16, 16), P(("fsdp", "tensor"))),
    "replicated": ((16, 8), P()),
    "layers": ((3, 16, 24), P(None, "fsdp", "tensor")),
    "stages": ((4, 16, 24), P("fsdp", None, "tensor")),
    "head_size": ((16, 2, 8), P("fsdp", None, "tensor")),
    "experts": ((2, 4, 8, 16), P(None, "fsdp", "tensor")),
}
RULE = Stacked(BalancedSplit(), where="layers|stages|experts")
RULE = Stacked(RULE, where="experts")


FEW = ("up", "query", "replicated", "stages", "experts")


def make_leaves(mesh=None, names=LEAVES):
    rng = np.random.default_rng(0)

    def leaf(shape, spec):
        x = rng.normal(size=shape).astype(np.float32)
        return x if mesh is None else jax.device_put(x, NamedSharding(mesh, spec))

    return {name: leaf(*LEAVES[name]) for name in names}


def shardings_of(tree):
    return jax.tree.map(lambda x: x.sharding, tree)


def types(tree):
    return jax.tree.map(lambda x: str(jax.typeof(x)), tree)


def update_twice(tx, params, placed=(None, None)):
    state = jax.jit(tx.init, out_shardings=placed[1])(params)
    update = jax.jit(tx.update, out_shardings=placed)
    for factor in (1.0, -0.5):
        grads = jax.tree.map(lambda p, f=factor: f * p + p**2, params)
        updates, state = update(grads, state, params)
    return updates, state


@pytest.mark.slow(but=1)
@pytest.mark.parametrize("kind", ["explicit", "auto", "explicit eager"])
def test_a_mesh_gives_the_polar_factors_of_one_device(kind, auto_mesh, explicit_mesh):
    names = FEW if kind == "explicit eager" else LEAVES
    plain, whole = orthogonalize(factoring=RULE), make_leaves(names=names)
    expected, _ = jax.jit(plain.update)(whole, plain.init(whole))
    mesh = (auto_mesh if kind == "auto" else explicit_mesh)(fsdp=4, tensor=2)
    leaves = make_leaves(mesh, names)
    given = shardings_of(leaves) if kind == "auto" else None
    tx = orthogonalize(factoring=RULE, params_sharding=given)
    update = tx.update if kind == "explicit eager" else jax.jit(tx.update)
    result, _ = update(leaves, tx.init(leaves))
    assert types(result) == types(leaves)
    chex.assert_trees_all_close(
        jax.tree.map(np.asarray, result), jax.tree.map(np.asarray, expected), atol=1e-5
    )


@pytest.mark.parametrize("magnitude", [1e-8, 1e6])
def test_matrices_of_any_magnitude_are_exchanged(auto_mesh, magnitude):
    """Float16 could hold none of these."""
    leaves = make_leaves(auto_mesh(fsdp=4, tensor=2), ["up", "square"])
    tx = orthogonalize(dtype="float16", params_sharding=shardings_of(leaves))
    update = jax.jit(lambda x: tx.update(x, tx.init(x))[0])
    result = update(jax.tree.map(lambda x: magnitude * x, leaves))
    chex.assert_trees_all_close(result, update(leaves), rtol=0.01, atol=0.01)
    assert all(0.1 < jnp.sqrt(jnp.mean(x**2)) < 0.3 for x in result.values())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["auto", "explicit"])
def test_came_muon_on_a_mesh_is_that_of_one_device(kind, auto_mesh, explicit_mesh):
    options = {"factoring": RULE, "mu_dtype": "float32", "weight_decay": 0.1}
    plain, whole = came_muon(1e-2, **options), make_leaves(names=FEW)
    expected = update_twice(plain, whole)
    mesh = (auto_mesh if kind == "auto" else explicit_mesh)(fsdp=4, tensor=2)
    params = make_leaves(mesh, FEW)
    shardings, tx, placed = shardings_of(params), plain, (None, None)
    if kind == "auto":
        tx = came_muon(1e-2, params_sharding=shardings, **options)
        placed = shardings, state_sharding(tx, params, shardings)
    result = update_twice(tx, params, placed)
    chex.assert_trees_all_close(
        *(jax.tree.map(np.asarray, tree) for tree in (result, expected)),
        rtol=1e-4,
        atol=1e-5,
    )


def test_on_explicit_axes_the_types_of_the_state_are_stable(explicit_mesh):
    params = make_leaves(explicit_mesh(fsdp=4, tensor=2))
    tx = came_muon(1e-2, factoring=RULE, weight_decay=0.1)
    state = jax.eval_shape(tx.init, params)
    updates, new_state = jax.eval_shape(tx.update, params, state, params)
    assert types(new_state) == types(state)
    assert types(updates) == types(params)


def test_inside_shard_map_matrices_are_local(auto_mesh):
    mesh = auto_mesh(fsdp=4, tensor=2)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 16, 12)), jnp.float32)
    tx = orthogonalize(
        factoring=LastTwoAxes(), params_sharding=NamedSharding(mesh, P("fsdp"))
    )
    of_shards = jax.shard_map(
        lambda x: tx.update(x, optax.EmptyState())[0],
        mesh=mesh,
        in_specs=P("fsdp"),
        out_specs=P("fsdp"),
    )
    expected, _ = tx.update(np.asarray(x), optax.EmptyState())
    chex.assert_trees_all_close(jax.jit(of_shards)(x), expected, atol=1e-5)


LAYER = {"q": (32, 32), "o": (32, 32), "up": (32, 64), "down": (64, 32)}


@pytest.mark.slow(but=2)
@pytest.mark.parametrize(
    ("sizes", "spec_of", "exchanges"),
    [
        # Into and out of two stacks, of (32, 32) and of (32, 64).
        ({"fsdp": 8}, lambda name: P("fsdp"), 8),
        (
            {"fsdp": 4, "tensor": 2},
            lambda name: P(*("fsdp", "tensor")[:: 1 if name in ("q", "up") else -1]),
            8,
        ),
        ({"data": 8}, lambda name: P(), 0),
    ],
    ids=["fsdp", "fsdp and tensor", "data"],
)
@pytest.mark.parametrize("layers", [2, 8])
def test_exchanges_do_not_grow_with_the_layers(
    auto_mesh, sizes, spec_of, exchanges, layers
):
    mesh = auto_mesh(**sizes)
    params = [
        {
            name: jax.ShapeDtypeStruct(
                shape, jnp.float32, sharding=NamedSharding(mesh, spec_of(name))
            )
            for name, shape in LAYER.items()
        }
    ] * layers
    shardings = shardings_of(params)
    tx = orthogonalize(params_sharding=shardings)
    step = jax.jit(
        lambda x: tx.update(x, optax.EmptyState())[0], out_shardings=shardings
    )
    compiled = step.lower(params).compile()
    found = collectives(compiled.as_text())
    received = sum(c.bytes for c in found)
    whole = 4 * sum(p.size for p in jax.tree.leaves(params))
    if not exchanges:  # The results go to all.
        assert {c.kind for c in found} == {"all-gather"}
        assert len(found) <= 2
        return
    assert {c.kind for c in found} == {"all-to-all"}
    assert len(found) <= exchanges
    assert received <= 2 * len(sizes) * max(whole, 8 / layers * whole) / 8


@pytest.mark.slow
def test_small_matrices_take_places_that_larger_ones_leave(auto_mesh):
    shardings = NamedSharding(auto_mesh(fsdp=8), P("fsdp"))
    tx = orthogonalize(params_sharding=shardings)

    def flops(*shapes):
        updates = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        step = jax.jit(
            lambda x: tx.update(x, optax.EmptyState())[0],
            in_shardings=(shardings,),
            out_shardings=shardings,
        )
        return step.lower(updates).compile().cost_analysis()["flops"]

    large, small = (64, 128), (64, 64)
    alone = flops(*[large] * 6)
    assert flops(*[large] * 6, *[small] * 2) < 1.1 * alone
    assert flops(*[large] * 6, *[small] * 3) > 1.4 * alone


def linen_boxes(params):
    return jax.tree.map(
        lambda p: nn.Partitioned(p, names=("fsdp", "tensor")[: p.ndim]), params
    )


def named_arrays(params):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hax = pytest.importorskip("haliax")
    return jax.tree.map(lambda p: hax.named(p, ("a", "b")[: p.ndim]), params)


def nnx_variables(params):
    return jax.tree.map(nnx.Param, params)


# Haliax itself looks there for a mesh.
@pytest.mark.filterwarnings("ignore:jax.interpreters.pxla.thread_resources")
@pytest.mark.slow
@pytest.mark.parametrize("boxed", [linen_boxes, named_arrays, nnx_variables])
def test_boxes_make_no_difference(boxed):
    rng = np.random.default_rng(0)
    shapes = {"embed": (96, 64), "up": (64, 72), "bias": (72,)}
    params = {
        k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()
    }
    in_boxes, tx = boxed(params), came_muon(1e-2, weight_decay=0.1)
    state = tx.init(in_boxes)
    updates, new_state = jax.jit(tx.update)(in_boxes, state, in_boxes)
    assert jax.tree.structure(updates) == jax.tree.structure(in_boxes)
    assert jax.tree.structure(new_state) == jax.tree.structure(state)
    expected, _ = jax.jit(tx.update)(params, tx.init(params), params)
    chex.assert_trees_all_close(
        jax.tree.leaves(updates), jax.tree.leaves(expected), rtol=1e-4, atol=1e-6
    )


class Model(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(16, 64, rngs=rngs)
        self.up = nnx.Linear(64, 72, rngs=rngs)
        self.head = nnx.Linear(72, 16, rngs=rngs)

    def __call__(self, tokens):
        return self.head(nnx.relu(self.up(self.embed(tokens))))


@pytest.mark.slow
def test_nnx_optimizer():
    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, came_muon(1e-2), wrt=nnx.Param)
    groups = optimizer.opt_state.inner_states
    numbers = {
        name: sum(x.size for x in jax.tree.leaves(optax.tree.get(groups[name], "mu")))
        for name in groups
    }
    assert numbers["hidden"] == 64 * 72 + 64 + 72  # Codes and their scales.
    tokens = jnp.arange(16)

    @nnx.jit
    def train_step(model, optimizer):
        def loss_of(model):
            logits, labels = model(tokens), jnp.roll(tokens, 1)
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return loss.mean()

        loss, grads = nnx.value_and_grad(loss_of)(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(train_step(model, optimizer)) for _ in range(30)]
    assert losses[-1] < 0.5 < 2 < losses[0]


@pytest.mark.tpu
@pytest.mark.parametrize("sizes", [{"fsdp": 16}, {"fsdp": 4, "tensor": 4}], ids=str)
def test_tpu_exchanges_matrices_and_shares_the_work(v5e_devices, sizes):
    devices = np.array(v5e_devices).reshape(tuple(sizes.values()))
    mesh = Mesh(devices, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
    sharding = NamedSharding(mesh, P(*sizes))
    shapes = [(256, 256)] * 4 + [(256, 1024)] * 3
    updates = [jax.ShapeDtypeStruct(s, jnp.float32, sharding=sharding) for s in shapes]
    updates, tx = updates * 8, orthogonalize(params_sharding=sharding)
    compiled = (
        jax.jit(lambda x: tx.update(x, optax.EmptyState())[0], out_shardings=sharding)
        .lower(updates)
        .compile()
    )
    found = collectives(compiled.as_text())
    assert {c.kind for c in found} == {"all-to-all"}
    assert len(found) <= 4 * len(sizes)  # Each of two stacks, into and out of it.
    sides = [sorted(x.shape) for x in updates]
    useful = sum(5 * (4 * m * m * n + 2 * m**3) for m, n in sides)
    assert 16 * compiled.cost_analysis()["flops"] < 1.25 * useful

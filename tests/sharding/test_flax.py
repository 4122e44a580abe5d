"""Flax's sharding metadata, and the trees of libraries that have none."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import PartitionSpec as P

from came_optax import (
    LastTwoAxes,
    Stacked,
    came,
    master_weights,
    split_weights,
    state_sharding,
    with_master_weights,
)

LAYERS, WIDTH, HIDDEN = 3, 8, 16
X = jax.random.normal(jax.random.key(0), (16, WIDTH))
KERNEL = nn.initializers.lecun_normal()
# The rule sees the paths of arrays, boxed or not: a variable's own key is not in them.
TX = came(1e-3, factoring=Stacked(LastTwoAxes(), where=r"layers/.*kernel$"))

# What each parameter is annotated with, and its statistics then must be.
SPECS = {
    "up": P("fsdp", "tensor"),
    "down": P(("tensor", "fsdp"), None),
    "layers": P(None, None, "fsdp"),
}
ROW_SPECS = {"up": P("fsdp"), "down": P(("tensor", "fsdp")), "layers": P(None, None)}
COL_SPECS = {"up": P("tensor"), "down": P(None), "layers": P(None, "fsdp")}


no_bias = functools.partial(nnx.Linear, use_bias=False)


class Layer(nnx.Module):
    def __init__(self, rngs):
        init = nnx.with_partitioning(KERNEL, (None, "fsdp"))
        self.dense = no_bias(WIDTH, WIDTH, kernel_init=init, rngs=rngs)

    def __call__(self, x):
        return x + self.dense(x)


class Model(nnx.Module):
    """Two projections, and layers stacked by ``nnx.scan``."""

    def __init__(self, rngs):
        init = nnx.with_partitioning(KERNEL, ("fsdp", "tensor"))
        self.up = nnx.Linear(WIDTH, HIDDEN, kernel_init=init, rngs=rngs)
        init = nnx.with_partitioning(KERNEL, (("tensor", "fsdp"), None))
        self.down = no_bias(HIDDEN, WIDTH, kernel_init=init, rngs=rngs)
        unnamed = {nnx.PARTITION_NAME: None}
        stack = nnx.vmap(Layer, in_axes=0, transform_metadata=unnamed)
        self.layers = nnx.split_rngs(splits=LAYERS)(stack)(rngs)

    def __call__(self, x):
        @nnx.scan(
            in_axes=(nnx.Carry, 0),
            out_axes=nnx.Carry,
            transform_metadata={nnx.PARTITION_NAME: None},
        )
        def apply(x, layer):
            return layer(x)

        return apply(self.down(nnx.relu(self.up(x))), self.layers)


def loss_of(model):
    return jnp.mean((model(X) - 1) ** 2)


@pytest.fixture
def mesh(auto_mesh):
    mesh = auto_mesh(fsdp=4, tensor=2)
    with jax.set_mesh(mesh):
        yield mesh


@nnx.jit
def create():
    model = Model(nnx.Rngs(0))
    return model, nnx.Optimizer(model, TX, wrt=nnx.Param)


@nnx.jit
def train_step(model, optimizer):
    loss, grads = nnx.value_and_grad(loss_of)(model)
    optimizer.update(model, grads)
    return loss


def kernels(tree):
    """Returns the leaf of each annotated kernel in a tree of specs or of arrays."""
    leaves = jax.tree.leaves_with_path(tree, is_leaf=lambda x: isinstance(x, P))
    names = [
        (jax.tree_util.keystr(p, simple=True, separator="/"), x) for p, x in leaves
    ]
    return {
        kind: next(x for name, x in names if f"{kind}/" in name and "kernel" in name)
        for kind in SPECS
    }


def test_nnx_statistics_are_named_and_placed(mesh):
    _, optimizer = create()
    specs = nnx.get_partition_spec(optimizer.opt_state)
    for field, expected in [
        ("mu", SPECS),
        ("v_row", ROW_SPECS),
        ("v_col", COL_SPECS),
        ("s_row", ROW_SPECS),
        ("s_col", COL_SPECS),
        ("v", dict.fromkeys(SPECS, P(None))),
    ]:
        assert kernels(optax.tree.get(specs, field)) == expected
        for name, x in kernels(optax.tree.get(optimizer.opt_state, field)).items():
            sharding = jax.NamedSharding(mesh, expected[name])
            assert x.sharding.is_equivalent_to(sharding, x.ndim)


@pytest.mark.slow
def test_nnx_functional_state(mesh):
    graph, params, rest = nnx.split(Model(nnx.Rngs(0)), nnx.Param, ...)
    shardings = state_sharding(TX, params, nnx.get_named_sharding(params, mesh))
    state = jax.jit(TX.init, out_shardings=shardings)(params)

    @functools.partial(jax.jit, out_shardings=(None, shardings))
    def update(state, params):
        grads = jax.grad(lambda p: loss_of(nnx.merge(graph, p, rest)))(params)
        return TX.update(grads, state, params)

    updates, new_state = update(state, params)
    assert jax.tree.structure(new_state) == jax.tree.structure(state)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)


NAMES = {
    "up": ("fsdp", "tensor"),
    "down": (("tensor", "fsdp"), None),
    "layers": (None, None, "fsdp"),
}
SHAPES = {"up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH), "layers": (3, WIDTH, WIDTH)}


@pytest.mark.parametrize("box", [nn.Partitioned, nn.LogicallyPartitioned])
def test_linen_statistics_are_named_and_placed(auto_mesh, box):
    mesh = auto_mesh(fsdp=4, tensor=2)

    def create():
        params = {
            name: {"kernel": box(jnp.ones(shape), NAMES[name])}
            for name, shape in SHAPES.items()
        }
        return TrainState.create(apply_fn=None, params=params, tx=TX)

    abstract = jax.eval_shape(create)
    specs = nn.get_partition_spec(abstract)
    for field, expected in ("mu", SPECS), ("v_row", ROW_SPECS), ("s_col", COL_SPECS):
        assert kernels(optax.tree.get(specs.opt_state, field)) == expected
    shardings = nn.get_sharding(abstract, mesh)
    for x, y in zip(
        jax.tree.leaves(shardings.opt_state),
        jax.tree.leaves(state_sharding(TX, abstract.params, shardings.params)),
        strict=True,
    ):
        assert x.is_equivalent_to(y, 3)
    state = jax.jit(create, out_shardings=shardings)()
    step = jax.jit(lambda s: s.apply_gradients(grads=s.params), out_shardings=shardings)
    compiled = step.lower(state).compile()
    chex.assert_trees_all_equal_shapes_and_dtypes(compiled(compiled(state)), state)


# At 0.01, plain bfloat16 would lose half of the steps of 1e-5.
NARROW = with_master_weights(came(1e-5, bias_correction=True), bits=32)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(nnx, "as_pure"), reason="this Flax has no as_pure")
def test_nnx_trains_bfloat16_weights(mesh):
    @nnx.jit
    def create_narrow():
        model = Model(nnx.Rngs(0))
        params = nnx.state(model, nnx.Param)
        nnx.update(model, optax.tree.cast(params, jnp.bfloat16))
        return model, nnx.Optimizer(model, NARROW, wrt=nnx.Param)

    model, optimizer = create_narrow()
    specs = nnx.get_partition_spec(optimizer.opt_state)
    assert kernels(specs.remainder) == kernels(optax.tree.get(specs, "mu")) == SPECS
    weights = optax.tree.cast(nnx.state(model, nnx.Param), jnp.float32)
    with jax.numpy_dtype_promotion("standard"):
        losses = [train_step(model, optimizer) for _ in range(3)]
    params = nnx.state(model, nnx.Param)
    assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    assert losses[0] > losses[1] > losses[2]
    after = master_weights(params, nnx.as_pure(optimizer.opt_state))
    moved = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), after, weights)
    assert min(jax.tree.leaves(moved)) > 1e-5


def boxes(dtype=jnp.float32):
    return nn.Partitioned(jnp.ones((4, 4), dtype), names=("fsdp", "tensor"))


def check_update(tx, params, state):
    updates, new_state = jax.jit(tx.update)(params, state, params)
    assert jax.tree.structure(new_state) == jax.tree.structure(state)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    return new_state


def test_linen_boxes_of_remainders():
    params = {"narrow": boxes(jnp.bfloat16), "wide": boxes()}
    state = NARROW.init(params)
    assert state.remainder["narrow"].names == ("fsdp", "tensor")
    assert state.remainder["wide"].names == (None,)
    new_state = check_update(NARROW, params, state)
    assert master_weights(params, new_state)["narrow"].names == ("fsdp", "tensor")


def test_linen_boxes_of_split_weights():
    """A job that goes on with them has a state of its optimizer."""
    weights = {"w": boxes(), "narrow": boxes(jnp.bfloat16)}
    params, remainder = split_weights(weights, bits=32)
    state = NARROW.init(params)
    assert remainder["w"].names == ("fsdp", "tensor")
    assert jax.tree.structure(remainder) == jax.tree.structure(state.remainder)
    check_update(NARROW, params, state._replace(remainder=remainder))


def test_half_masked_boxes():
    tx = optax.masked(came(1e-3), {"up": True, "down": False})
    params = {"up": boxes(), "down": boxes()}
    state = tx.init(params)
    assert optax.tree.get(state, "v_col")["up"].names == ("tensor",)
    check_update(tx, params, state)

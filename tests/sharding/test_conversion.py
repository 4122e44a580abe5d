"""A running job goes on on another mesh, and in boxes."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from came_optax import (
    BalancedSplit,
    Stacked,
    came_muon,
    convert_state,
    state_sharding,
    steady_came,
)

pytestmark = pytest.mark.usefixtures("promotion")
SCHEDULE = optax.linear_schedule(0.0, 1e-2, 100)
SHAPES = {"bias": (96,), "kernel": (80, 96), "query": (4, 32, 4, 16), "long": (5000,)}
PARAMS = {
    name: np.random.default_rng(0).normal(size=shape).astype(np.float32)
    for name, shape in SHAPES.items()
}


def cosine(x, y):
    return float(jnp.vdot(x, y) / jnp.linalg.norm(x) / jnp.linalg.norm(y))


def train(tx, state, params, steps):
    update = jax.jit(tx.update)
    for step in steps:
        grads = jax.tree.map(lambda p, step=step: jnp.cos(step + 3 * p), params)
        updates, state = update(grads, state, params)
    return updates, state


def placed(*shape):
    """Returns shardings of the parameters on a mesh of this shape."""
    mesh = jax.make_mesh(shape, ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    specs = {"kernel": P("fsdp", "tensor"), "query": P(None, "fsdp", "tensor")}
    return {name: NamedSharding(mesh, specs.get(name, P())) for name in SHAPES}


@pytest.mark.slow
def test_on_another_mesh():
    """What ran on one mesh goes on on another as it would on one device."""
    params, rule = PARAMS, Stacked(BalancedSplit(), where="query")
    old = steady_came(1e-3, mu_dtype="int8")
    new = steady_came(1e-3, mu_dtype="int4", factoring=rule)
    here, there = placed(8, 1), placed(2, 4)
    init = jax.jit(old.init, out_shardings=state_sharding(old, params, here))
    on_here = jax.device_put(params, here)
    _, state = train(old, init(on_here), on_here, range(3))
    alone = jax.device_get(state)

    moved = jax.device_put(state, state_sharding(old, params, there))
    on_there = jax.device_put(params, there)
    converted = jax.jit(
        lambda state, params: convert_state(state, params, old=old, new=new),
        out_shardings=state_sharding(new, params, there),
    )(moved, on_there)
    assert converted[0].mu["kernel"].values.sharding.spec == P("fsdp", "tensor")
    assert converted[0].v_col["kernel"].sharding.spec == P("tensor")
    expected = convert_state(alone, params, old=old, new=new)
    updates, _ = train(new, converted, on_there, range(3, 4))
    expected_updates, _ = train(new, expected, params, range(3, 4))
    for name in params:
        x, y = updates[name], expected_updates[name]
        np.testing.assert_allclose(x, y, atol=1e-3 * float(y.std()), err_msg=name)


@pytest.mark.slow(but=1)
@pytest.mark.parametrize("explicit", [True, False], ids=["Explicit", "Auto"])
def test_what_both_have_survives_on_a_mesh(explicit):
    """Whatever its sharding: on an ``Auto`` mesh that isn't set, and under jit."""
    whole = {"embed": jnp.full((96, 8), 0.1), "kernel": jnp.ones((64, 64))}
    kind = AxisType.Explicit if explicit else AxisType.Auto
    mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(kind,))
    old, new = (
        optax.apply_if_finite(optax.MultiSteps(tx, 4).gradient_transformation(), 9)
        for tx in (optax.adamw(1e-3), steady_came(1e-3, mu_dtype="int8"))
    )

    def convert(state, params):
        return convert_state(state, params, old=old, new=new)

    with jax.set_mesh(mesh) if explicit else contextlib.nullcontext():
        params = jax.device_put(whole, NamedSharding(mesh, P("fsdp")))
        state, update = jax.jit(old.init)(params), jax.jit(old.update)
        for scale in (jnp.nan, 1, 1, 1, 1, 2, 3):
            grads = jax.tree.map(lambda p, s=scale: s * p, params)
            _, state = update(grads, state, params)
        otherwise = NamedSharding(mesh, P(None, "fsdp"))
        gathered = dict(state.inner_state.acc_grads)
        gathered["kernel"] = jax.device_put(gathered["kernel"], otherwise)
        inner = state.inner_state._replace(acc_grads=gathered)
        convert = jax.jit(convert) if explicit else convert
        moved = convert(state._replace(inner_state=inner), params)
        fresh = jax.jit(new.init)(params).inner_state.inner_opt_state
        moments = moved.inner_state.inner_opt_state
        if explicit:
            assert jax.tree.map(jax.typeof, moments) == jax.tree.map(jax.typeof, fresh)
    assert (moved.notfinite_count, moved.total_notfinite) == (0, 1)
    inner = moved.inner_state
    assert (inner.mini_step, inner.gradient_step) == (2, 1)
    assert inner.acc_grads["kernel"].sharding == otherwise
    assert jnp.all(inner.acc_grads["kernel"] == 2.5)


def test_flax_boxes():
    boxed = {"kernel": nn.Partitioned(jnp.ones((80, 96)), ("fsdp", "tensor"))}
    old, new = optax.adamw(1e-3), steady_came(1e-3, mu_dtype="int8")
    converted = convert_state(old.init(boxed), boxed, old=old, new=new)
    assert jax.tree.structure(converted) == jax.tree.structure(new.init(boxed))


@pytest.mark.slow
def test_nnx_optimizer_goes_on():
    """Its state is put back with ``nnx.update``."""
    model = nnx.Linear(64, 96, rngs=nnx.Rngs(0))
    old, new = optax.adamw(SCHEDULE), steady_came(SCHEDULE, mu_dtype="int8")

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda model: jnp.mean(model(jnp.ones((1, 64))) ** 2))(model)
        before = model.kernel[...]
        optimizer.update(model, grads)
        return model.kernel[...] - before

    optimizer = nnx.Optimizer(model, old, wrt=nnx.Param)
    for _ in range(10):
        last = step(model, optimizer)
    converted = convert_state(
        optimizer.opt_state, nnx.state(model, nnx.Param), old=old, new=new
    )
    optimizer = nnx.Optimizer(model, new, wrt=nnx.Param)
    nnx.update(optimizer.opt_state, nnx.state(converted))
    assert optimizer.opt_state[-1].count[...] == 10
    assert optimizer.opt_state[0].mu["kernel"].values.dtype == jnp.int8
    moved = step(model, optimizer)
    assert cosine(moved, last) > 0.95
    np.testing.assert_allclose(jnp.linalg.norm(moved), jnp.linalg.norm(last), rtol=0.3)


def test_leaves_that_nnx_boxes_though_they_are_masked():
    old, new = optax.contrib.muon(1e-2), came_muon(1e-2, mu_dtype=None)
    model = nnx.Linear(64, 96, rngs=nnx.Rngs(0))
    params = nnx.state(model, nnx.Param)
    optimizer = nnx.Optimizer(model, old, wrt=nnx.Param)
    optimizer.update(model, params)
    state = convert_state(optimizer.opt_state, params, old=old, new=new)
    before = optax.tree.get(optimizer.opt_state.inner_states["muon"], "mu")["kernel"]
    optimizer = nnx.Optimizer(model, new, wrt=nnx.Param)
    nnx.update(optimizer.opt_state, nnx.state(state))
    after = optax.tree.get(optimizer.opt_state.inner_states["hidden"], "mu")["kernel"]
    assert cosine(before[...], after[...]) > 0.999

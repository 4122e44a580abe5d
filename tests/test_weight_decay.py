"""Which parameters decay, by how much, and what of a mask is refused."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

from came_optax import came, came_muon

PARAMS = {"kernel": jnp.ones((6, 4)), "bias": jnp.ones(4)}


def decayed(params, mask):
    """Returns which leaves an update without gradients makes smaller."""
    tx = came(0.1, weight_decay=0.5, weight_decay_mask=mask)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(tx.update)(zeros, tx.init(params), params)
    return jax.tree.map(lambda u: bool(jnp.any(u != 0)), updates)


def test_a_mask_by_dtype_sees_the_parameters_themselves():
    params = {"narrow": jnp.ones((6, 5), jnp.bfloat16), "wide": jnp.ones((6, 5))}
    seen = decayed(params, lambda p: jax.tree.map(lambda x: x.dtype == jnp.bfloat16, p))
    assert seen == {"narrow": True, "wide": False}


def test_a_mask_sees_boxes_as_they_are():
    def is_box(x):
        return isinstance(x, nn.Partitioned)

    boxed = nn.Partitioned(jnp.ones((6, 5)), ("a", None))
    seen = decayed(
        {"boxed": boxed, "bare": jnp.ones(5)},
        lambda params: jax.tree.map(is_box, params, is_leaf=is_box),
    )
    assert (seen["boxed"].value, seen["bare"]) == (True, False)
    state = nnx.state(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), nnx.Param)
    by_rank = decayed(state, lambda s: jax.tree.map(lambda p: p.ndim > 1, s))
    assert nnx.to_pure_dict(by_rank) == {"kernel": True, "bias": False}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_weight_decay_is_rounded_once(dtype):
    params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(6, 5)), dtype)}
    tx = came(0.1, weight_decay=0.3)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(tx.update)(zeros, tx.init(params), params)
    exact = jnp.float32(-0.1) * (jnp.float32(0.3) * params["w"].astype(jnp.float32))
    np.testing.assert_array_equal(updates["w"], exact.astype(dtype))


def test_weight_decay_needs_params():
    tx = came(1e-3, weight_decay=0.1)
    with pytest.raises(ValueError, match="you are not passing `params`"):
        tx.update(PARAMS, tx.init(PARAMS))
    for zero in 0, 0.0, np.float32(0), np.array(0.0):  # And none does not.
        came(1e-3, weight_decay=zero).update(PARAMS, tx.init(PARAMS))


@pytest.mark.parametrize(
    "mask, error, message",
    [
        ({"kernel": True}, ValueError, "does not fit the parameters: (.|\n)*bias"),
        ({"kernel": 1.0, "bias": False}, TypeError, "got 1.0 at 'kernel'$"),
        (lambda params: "yes", TypeError, "a tree of bools or .* got 'yes'$"),
    ],
)
def test_weight_decay_masks(mask, error, message):
    tx = came(1e-3, weight_decay=0.1, weight_decay_mask=mask)
    with pytest.raises(error, match=f"^weight_decay_mask .*{message}"):
        tx.init(PARAMS)


def test_a_mask_that_was_taken_for_a_schedule_is_refused():
    """It would be called with the step, and nothing, or everything, would decay."""

    def kernels(params):
        return jax.tree.map_with_path(lambda path, _: "kernel" in str(path), params)

    options = {"weight_decay": 0.5, "weight_decay_mask": kernels}
    with pytest.raises(TypeError, match=r'static_args="weight_decay_mask"'):
        optax.inject_hyperparams(came)(0.1, **options).init(PARAMS)
    with pytest.raises(TypeError, match=r"^weight_decay_mask=False is no tree"):
        came(0.1, weight_decay_mask=False)
    tx = optax.inject_hyperparams(came, static_args="weight_decay_mask")(0.1, **options)
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    updates, _ = tx.update(zeros, tx.init(PARAMS), PARAMS)
    assert jnp.all(updates["kernel"] < 0) and not jnp.any(updates["bias"])


@pytest.mark.parametrize("name", ["weight_decay_mask", "hidden"])
def test_a_mask_may_be_in_nnxs_variables(name):
    model = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
    mask = jax.tree.map(lambda p: p.ndim > 1, nnx.state(model, nnx.Param))
    tx = came_muon(0.1, weight_decay=0.5, **{name: mask})
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    before = jnp.array(model.kernel[...])
    zeros = jax.tree.map(jnp.zeros_like, nnx.state(model, nnx.Param))
    optimizer.update(model, zeros)
    np.testing.assert_allclose(model.kernel[...], 0.95 * before, rtol=1e-6)


def test_a_weight_decay_mask_may_be_a_module():
    """Modules of Equinox are trees that can be called."""
    linear = eqx.filter(eqx.nn.Linear(3, 3, key=jax.random.key(0)), eqx.is_array)
    mask = jax.tree.map(lambda p: p.ndim > 1, linear)
    zeros = jax.tree.map(jnp.zeros_like, linear)
    for given in (mask, lambda _: mask, jax.tree_util.Partial(lambda _: mask)):
        tx = came(0.1, weight_decay=0.5, weight_decay_mask=given)
        updates, _ = tx.update(zeros, tx.init(linear), linear)
        np.testing.assert_allclose(updates.weight, -0.05 * linear.weight, rtol=1e-6)
        np.testing.assert_array_equal(updates.bias, 0.0)

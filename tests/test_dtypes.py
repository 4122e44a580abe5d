"""Of which dtype updates and states are, whatever parameters and gradients are."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from came_optax import (
    came,
    scale_by_confidence,
    scale_by_factored_moment,
)
from tests.optimizers import OPTIMIZERS

NARROW = [jnp.float16, jnp.bfloat16, jnp.float32]
DTYPES = [*NARROW, jnp.float64, jnp.complex64, jnp.complex128]
SHAPES = [(3,), (2, 48, 46), ()]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_types_are_stable_under_cond_and_scan(name):
    with jax.enable_x64(True):
        pairs = itertools.product(SHAPES, DTYPES)
        params = [jax.ShapeDtypeStruct(*pair) for pair in pairs]
        tx = OPTIMIZERS[name]
        start = params, jax.eval_shape(tx.init, params)

        def step(carry, skip):
            params, state = carry
            updates, state = jax.lax.cond(
                skip,
                lambda: (optax.tree.zeros_like(params), state),
                lambda: tx.update(params, state, params),
            )
            chex.assert_trees_all_equal_dtypes(updates, params)
            return (optax.apply_updates(params, updates), state), None

        skips = jnp.array([False, True, False])
        end, _ = jax.eval_shape(lambda c: jax.lax.scan(step, c, skips), start)
        assert jax.tree.map(jax.typeof, end) == jax.tree.map(jax.typeof, start)


@pytest.mark.parametrize("injected", [False, True])
def test_updates_have_the_dtype_of_the_params(injected):
    """Of the gradients without params, and in halves: rounded once, at the end."""
    # The float32 arrays that inject_hyperparams makes must not promote the updates.
    inject = optax.inject_hyperparams(came, hyperparam_dtype=jnp.float32)
    tx = (inject if injected else came)(1e-2, weight_decay=0.1)
    dtypes = NARROW if injected else [*NARROW, jnp.float64]
    with jax.enable_x64(True):
        pairs = [*itertools.product(dtypes, repeat=2)]
        params, grads = (
            [jax.ShapeDtypeStruct((3, 2), pair[i]) for pair in pairs] for i in (0, 1)
        )

        def update(tx, *params_or_none):
            state = jax.eval_shape(tx.init, params)
            return jax.eval_shape(tx.update, grads, state, *params_or_none)

        updates, state = update(tx, params)
        chex.assert_trees_all_equal_dtypes(updates, params)
        for statistic in ("mu", "v_row", "v_col", "s_row", "s_col"):
            for x, p in zip(optax.tree.get(state, statistic), params, strict=True):
                wide = p.dtype if p.dtype == jnp.float64 else jnp.float32
                assert x.dtype == wide, statistic
        halves = scale_by_factored_moment(), scale_by_confidence()
        for of_grads in [(came(1e-2),), *((half, params) for half in halves)]:
            updates, _ = update(*of_grads)
            chex.assert_trees_all_equal_dtypes(updates, grads)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.complex128])
def test_numpy_params_are_jax_arrays_of_the_same_values(dtype):
    # Outside x64, jax takes NumPy's 64-bit arrays for 32-bit ones; so do we, silently.
    tx = came(1e-2, weight_decay=0.1)
    numpy = {"kernel": np.ones((3, 2), dtype), "bias": np.ones(2, dtype)}
    jaxed = jax.tree.map(jnp.asarray, numpy)
    ours, expected = (jax.jit(tx.update)(x, tx.init(x), x) for x in (numpy, jaxed))
    chex.assert_trees_all_equal(ours, expected)

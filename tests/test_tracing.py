"""Tracing takes time for each shape, not for each leaf."""

import jax
import jax.numpy as jnp
import pytest

from came_optax import _algorithm as algorithm
from came_optax import scale_by_came


@pytest.mark.parametrize("mu_dtype", ["float32", "int8"])
def test_leaves_of_one_shape_are_traced_once(monkeypatch, mu_dtype):
    traced = []
    divide = algorithm.divide_by_root

    def recorded(x, *args):
        traced.append(x.shape)
        return divide(x, *args)

    monkeypatch.setattr(algorithm, "divide_by_root", recorded)
    tx = scale_by_came(mu_dtype=mu_dtype)

    def shapes_traced(leaves):
        traced.clear()
        jax.clear_caches()
        params = [jax.ShapeDtypeStruct((64, 96), jnp.float32)] * leaves
        jax.eval_shape(tx.update, params, jax.eval_shape(tx.init, params), params)
        return list(traced)

    assert shapes_traced(5) == shapes_traced(1) != []

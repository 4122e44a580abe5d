"""Building a transformation leaves JAX alone: no array, no tracer, no backend."""

import functools
import socket
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from flax.training.train_state import TrainState

from came_optax import came, steady_came

MU_DTYPES = [None, "bfloat16", "int8", "int4"]


BUILD = """
import jax
import jax.numpy as jnp
import optax
import came_optax as c

for mu_dtype in (None, "float32", "bfloat16", jnp.bfloat16, "int8", "int4"):
    c.came(1e-3, weight_decay=0.1, mu_dtype=mu_dtype)
    c.steady_came(optax.cosine_decay_schedule(1e-3, 10), mu_dtype=mu_dtype)
    c.scale_by_came(mu_dtype=mu_dtype, factoring=c.Stacked(c.BalancedSplit()))
    c.scale_by_confidence(mu_dtype=mu_dtype)
c.scale_by_factored_moment(factoring=c.LargestTwoAxes(8))
optax.inject_hyperparams(c.came)(1e-3)
{more}
# It refuses to come after any computation.
jax.distributed.initialize("localhost:{port}", num_processes=1, process_id=0)
"""


def build(more=""):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        source = BUILD.format(more=more, port=free.getsockname()[1])
    return subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, check=False
    )


def test_no_backend_starts():
    done = build()
    assert done.returncode == 0, done.stderr
    # This would show if one did.
    refused = build("jnp.zeros(())")
    assert "must be called before any JAX" in refused.stderr


@pytest.mark.slow(but=1)
@pytest.mark.parametrize("mu_dtype", MU_DTYPES)
def test_built_inside_a_jitted_train_state(mu_dtype):
    params = {"kernel": jnp.ones((64, 64)), "bias": jnp.zeros(64)}

    def create(params):
        tx = came(1e-2, weight_decay=0.1, mu_dtype=mu_dtype)
        return TrainState.create(apply_fn=None, params=params, tx=tx)

    inside, outside = jax.jit(create)(params), create(params)
    step = jax.jit(lambda state, grads: state.apply_gradients(grads=grads))
    for _ in range(2):
        grads = jax.tree.map(jnp.cos, inside.params)
        inside, outside = step(inside, grads), step(outside, grads)
    chex.assert_trees_all_close(inside.params, outside.params)


@pytest.mark.slow(but=3)
@pytest.mark.parametrize("make", [came, optax.inject_hyperparams(came)])
@pytest.mark.parametrize("mu_dtype", MU_DTYPES)
def test_no_tracer_leaks(make, mu_dtype):
    params = {"kernel": jnp.ones((64, 64)), "bias": jnp.zeros(64)}
    with jax.checking_leaks():

        @jax.jit
        def two_steps(params):
            tx = make(1e-2, mu_dtype=mu_dtype)
            _, state = tx.update(params, tx.init(params), params)
            return tx.update(params, state, params)[0]

        chex.assert_tree_all_finite(two_steps(params))


@pytest.mark.slow(but=1)
@pytest.mark.parametrize("make", [came, steady_came])
def test_hyperparameters_may_be_traced(make):
    """A sweep over b2 and eps2 by vmap, and the same one by one."""
    g = jax.random.normal(jax.random.key(0), (8, 6))

    def second_update(b2, eps2):
        tx = make(1e-2, b2=b2, eps2=eps2)
        return tx.update(g, tx.update(g, tx.init(g))[1])[0]

    b2s, eps2s = jnp.float32([0.9, 0.99]), jnp.float32([1e-3, 0.1])
    mapped = jax.jit(jax.vmap(second_update))(b2s, eps2s)
    for i in range(2):
        alone = jax.jit(second_update)(b2s[i], eps2s[i])
        chex.assert_trees_all_close(mapped[i], alone, rtol=1e-5)
        numbers = float(b2s[i]), float(eps2s[i])
        static = jax.jit(functools.partial(second_update, *numbers))()
        chex.assert_trees_all_close(static, alone, rtol=1e-5)

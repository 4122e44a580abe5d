"""The targets that optax asks its optimizers to reach, real and complex."""

import functools

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

from came_optax import came, scale_by_confidence, scale_by_factored_moment

VARIANTS = {
    "published": came(1e-2),
    "bias_correction": came(1e-2, bias_correction=True),
    "update_clipping": came(1e-2, update_clipping_threshold=1.0),
    "bfloat16 mu": came(1e-2, mu_dtype="bfloat16"),
    "first half": optax.chain(scale_by_factored_moment(), optax.scale(-3e-3)),
    "both halves": optax.chain(
        scale_by_factored_moment(), scale_by_confidence(), optax.scale(-3e-3)
    ),
}


def squared_distance(params, solution):
    return optax.tree.norm(optax.tree.sub(params, solution), squared=True)


def rosenbrock(params, solution):
    x, y = params
    far = jnp.array([solution[0] - x, 10 * (y - x**2)])
    return optax.tree.norm(far, squared=True)


def targets(dtype):
    """Returns the initial parameters and the solution of each target."""
    array = functools.partial(jnp.asarray, dtype=dtype)
    turn = array(1 + 1j) if jnp.issubdtype(dtype, jnp.complexfloating) else array(1)
    start = {
        "parabola": array([-1.0, 10.0, 1.0]),
        "rosenbrock": array([0.0, 0.0]),
        "matrix": array(jnp.zeros((2, 2))),
    }
    solution = {
        "parabola": turn * array([1.0, -1.0, 1.0]),
        "rosenbrock": jnp.stack([turn, turn**2]),
        "matrix": turn * array([[3.0, -2.0], [1.0, 4.0]]),
    }
    return start, solution


def objective(params, solution):
    return sum(
        (rosenbrock if name == "rosenbrock" else squared_distance)(p, solution[name])
        for name, p in params.items()
    )


@pytest.mark.slow(but=2)
@pytest.mark.parametrize("variant", VARIANTS)
def test_reaches_the_solutions(variant):
    """Leaves do not see each other, so that all targets are reached at once."""
    tx = VARIANTS[variant]
    pairs = [targets(dtype) for dtype in (jnp.float32, jnp.complex64)]
    starts, solutions = zip(*pairs, strict=True)

    def total(params):
        return sum(map(objective, params, solutions))

    def step(carry, _):
        params, state = carry
        # optax's convention: the descent direction is the conjugate of jax's gradient.
        grads = optax.tree.conj(jax.grad(total)(params))
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def optimize(params):
        return jax.lax.scan(step, (params, tx.init(params)), length=10_000)[0]

    params, state = optimize(starts)
    for columns in optax.tree.get(state, "v_col"):
        shapes = jax.tree.map(jnp.shape, columns)
        assert shapes == {"parabola": (1,), "rosenbrock": (1,), "matrix": (2,)}
    chex.assert_trees_all_close(params, solutions, rtol=3e-2, atol=3e-2)

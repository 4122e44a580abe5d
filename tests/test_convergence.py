"""The four targets that optax asks its optimizers to reach, real and complex."""

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


def target(name, dtype):
    """Returns the initial parameters, the solution and the objective of both."""
    array = functools.partial(jnp.asarray, dtype=dtype)
    turn = array(1 + 1j) if jnp.issubdtype(dtype, jnp.complexfloating) else array(1)
    if name == "parabola":
        start = array([-1.0, 10.0, 1.0])
        return start, turn * array([1.0, -1.0, 1.0]), squared_distance
    if name == "rosenbrock":
        return array([0.0, 0.0]), jnp.stack([turn, turn**2]), rosenbrock
    if name == "matrix":
        solution = turn * array([[3.0, -2.0], [1.0, 4.0]])
        return jnp.zeros_like(solution), solution, squared_distance
    mixed = [turn * array([1.0, -1.0, 2.0]), turn * array([[1.0, 0.0], [-1.0, 1.0]])]
    return optax.tree.zeros_like(mixed), mixed, squared_distance


def test_matrices_are_factored():
    for name, tx in VARIANTS.items():
        for leaf, column in (("matrix", (2,)), ("mixed", [(1,), (2,)])):
            state = tx.init(target(leaf, jnp.float32)[0])
            statistics = optax.tree.get(state, "v_col")
            assert jax.tree.map(jnp.shape, statistics) == column, name


@pytest.mark.slow(but=8)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.complex64], ids=["real", "complex"])
@pytest.mark.parametrize("name", ["parabola", "rosenbrock", "matrix", "mixed"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_reaches_the_solution(variant, name, dtype):
    tx = VARIANTS[variant]
    start, solution, objective = target(name, dtype)

    def step(carry, _):
        params, state = carry
        # optax's convention: the descent direction is the conjugate of jax's gradient.
        grads = optax.tree.conj(jax.grad(objective)(params, solution))
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def optimize(params):
        carry = params, tx.init(params)
        return jax.lax.scan(step, carry, length=10_000)[0][0]

    chex.assert_trees_all_close(optimize(start), solution, rtol=3e-2, atol=3e-2)

"""What docs/how-it-works.md promises of steady_came."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from came_optax import scale_by_came, steady_came


def steady(**options):
    """Its updates in learning rates, not yet turned downhill."""
    return optax.chain(steady_came(1.0, **options), optax.scale(-1.0))


def distance_of_a_rare_row(tx, silent, rows):
    """How far one gradient moves a row that had none, in learning rates."""

    def step(carry, key):
        state, t = carry
        hit = jnp.where(t == silent, 1.0, 0.0)
        g = jax.random.normal(key, (rows, 8)).at[0].set(hit)
        updates, state = tx.update(g, state)
        return (state, t + 1), updates[0]

    @jax.jit
    def run(keys):
        start = (tx.init(jnp.zeros((rows, 8))), jnp.int32(0))
        return jax.lax.scan(step, start, keys)[1]

    row = run(jax.random.split(jax.random.key(0), silent + 150))
    assert not np.any(row[:silent])
    return float(jnp.mean(jnp.sum(row, axis=0)))


@pytest.mark.slow(but=1)
@pytest.mark.parametrize("rows", [16, 256])
def test_rare_row_moves_less_than_half_as_far_as_under_adam(rows):
    silent = 2000
    with jax.numpy_dtype_promotion("standard"):
        adam = distance_of_a_rare_row(optax.scale_by_adam(), silent, rows)
    assert adam == pytest.approx(30, rel=0.03)
    assert 9 < distance_of_a_rare_row(steady(), silent, rows) < 14
    assert distance_of_a_rare_row(scale_by_came(), silent, rows) > 3 * adam


def test_the_first_step_and_those_under_noise():
    def step(state, key):
        updates, state = tx.update(jax.random.normal(key, (64, 64)), state)
        return state, jnp.sqrt(jnp.mean(jnp.square(updates)))

    tx = steady()
    keys = jax.random.split(jax.random.key(0), 1000)
    rms = jax.lax.scan(step, tx.init(jnp.zeros((64, 64))), keys)[1]
    assert rms[0] == rms.max() == pytest.approx(1.54, rel=0.01)
    assert rms[-1] == pytest.approx(0.27, rel=0.05)


def test_constant_gradient_moves_a_leaf_by_the_root_of_eps2_at_most():
    g = jnp.outer(jnp.arange(1.0, 7.0), jnp.arange(1.0, 6.0))

    def final_rms(tx):
        def step(state, _):
            updates, state = tx.update(g, state)
            return state, jnp.sqrt(jnp.mean(jnp.square(updates)))

        return jax.lax.scan(step, tx.init(g), length=20_000)[1][-1]

    assert final_rms(steady()) == pytest.approx(0.1**-0.5, rel=1e-3)
    clipped = steady(update_clipping_threshold=1.0)
    assert final_rms(clipped) == pytest.approx(1, rel=1e-5)
    assert final_rms(scale_by_came()) > 100

"""What CAME does over time, in closed form: docs and defaults rest on these numbers."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from came_optax import (
    came,
    scale_by_came,
    scale_by_confidence,
    scale_by_factored_moment,
    steady_came,
)

BETAS = [(0.9, 0.999, 0.9999), (0.5, 0.9, 0.99), (0.95, 0.99, 0.999)]


def updates_over_time(tx, grads):
    """Returns the updates for gradients stacked along axis 0."""

    def step(state, g):
        updates, state = tx.update(g, state)
        return state, updates

    state = tx.init(jax.tree.map(lambda g: g[0], grads))
    return jax.jit(lambda *xs: jax.lax.scan(step, *xs)[1])(state, grads)


def rms(x):
    """Returns the root mean square of each update."""
    return np.sqrt(np.mean(np.square(x), axis=tuple(range(1, x.ndim))))


def rank_one(scale=1.0):
    """Returns a matrix with |g| of rank one, and any signs."""
    rng = np.random.default_rng(0)
    magnitude = np.outer(rng.lognormal(size=6), rng.lognormal(size=5))
    return jnp.asarray(scale * magnitude * rng.choice([-1, 1], (6, 5)), jnp.float32)


def noise(steps, shape=(48, 32)):
    return jax.random.normal(jax.random.key(0), (steps, *shape))


# Of independent updates with RMS 1 (the clip sees to that while v is young).


def momentum_square(t, b1):
    """Returns E[m²] after t steps."""
    return (1 - b1) / (1 + b1) * (1 - b1 ** (2 * t))


def instability(steps, b1, b3):
    """Returns E[s] after each of some steps; u − m is b1 (u − the m before)."""
    s = np.zeros(steps + 1)
    for t in range(1, steps + 1):
        residual = b1**2 * (1 + momentum_square(t - 1, b1))
        s[t] = b3 * s[t - 1] + (1 - b3) * residual
    return s[1:]


@pytest.mark.slow(but=5)
@pytest.mark.parametrize("betas", BETAS)
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
@pytest.mark.parametrize("clip", [0.5, 1.0])
def test_first_step(betas, scale, clip):
    """u = ±d: m = (1 − β1) d, u − m = β1 d, and d cancels in a matrix's step."""
    b1, b2, b3 = betas
    g = {"matrix": rank_one(scale), "vector": rank_one(scale)[0]}
    tx = came(1.0, b1, b2, b3=b3, clipping_threshold=clip)
    updates, _ = tx.update(g, tx.init(g))
    step = (1 - b1) / (b1 * np.sqrt(1 - b3))
    sign = jax.tree.map(lambda g: np.sign(g).astype(np.float32), g)
    expected = {"matrix": -step * sign["matrix"]}
    expected["vector"] = -(1 - b1) * clip * sign["vector"]
    # 1 − float32(0.9999) is 1e-4 to a relative 1.7e-4 only.
    chex.assert_trees_all_close(updates, expected, rtol=2e-4)


def test_step_size_on_noise_decays_as_if_scheduled():
    """RMS(Δ) = sqrt(E[m²] / E[s]): no bias correction is a schedule 1/sqrt(1 − β3ᵗ)."""
    steps = 3000
    measured = rms(updates_over_time(scale_by_came(), noise(steps)))
    t = np.arange(1, steps + 1)
    expected = np.sqrt(momentum_square(t, 0.9) / instability(steps, 0.9, 0.9999))
    np.testing.assert_allclose(measured, expected, rtol=0.08)
    published = [11.1, 7.5, 2.5, 0.8, 0.5]
    np.testing.assert_allclose(measured[[0, 9, 99, 999, 2999]], published, rtol=0.05)


@pytest.mark.parametrize(
    ("half", "factor"),
    [
        (scale_by_factored_moment, lambda t: np.sqrt(1 - 0.999**t)),
        (scale_by_confidence, lambda t: np.sqrt(1 - 0.9999**t) / (1 - 0.9**t)),
    ],
    ids=["factored moment", "confidence"],
)
def test_bias_correction_is_a_factor_and_leaves_the_state(half, factor):
    """So that the residual u − m keeps the uncorrected m."""
    steps = 1000
    grads = noise(steps, (6, 4))

    def updates_and_states(tx):
        def step(state, g):
            updates, state = tx.update(g, state)
            return state, (updates, state)

        return jax.jit(lambda gs: jax.lax.scan(step, tx.init(gs[0]), gs)[1])(grads)

    plain, plain_state = updates_and_states(half())
    corrected, corrected_state = updates_and_states(half(bias_correction=True))
    chex.assert_trees_all_close(corrected_state, plain_state, rtol=1e-6)
    expected = factor(np.arange(1, steps + 1.0)).reshape(-1, 1, 1) * plain
    np.testing.assert_allclose(corrected, expected, rtol=2e-4)


@pytest.mark.parametrize("eps2", [1e-4, 1e-8])
def test_confidence_in_a_constant_gradient_is_bounded_by_eps2_alone(eps2):
    """u = ±1: m = 1 − β1ᵗ, u − m = β1ᵗ, and s forgets its start until ε2 is left."""
    b1, b3 = 0.9, 0.97
    steps = 1500
    tx = scale_by_came(b1=b1, b3=b3, eps2=eps2)
    grads = jnp.broadcast_to(rank_one(), (steps, 6, 5))
    step_size = jnp.abs(updates_over_time(tx, grads))
    t = np.arange(1, steps + 1)
    s = [(1 - b3) * (b1**2 + eps2)]
    for residual in b1 ** t[1:]:
        s.append(b3 * s[-1] + (1 - b3) * (residual**2 + eps2))
    expected = (1 - b1**t) / np.sqrt(s)
    np.testing.assert_allclose(
        step_size, np.broadcast_to(expected[:, None, None], step_size.shape), rtol=1e-3
    )
    assert np.all(np.diff(step_size[30:200:10], axis=0) > 0)  # It grows…
    np.testing.assert_allclose(step_size[-1], 1 / np.sqrt(eps2), rtol=1e-3)  # …to this.


def test_published_confidence_in_a_constant_gradient_keeps_growing():
    """s decays as β3ᵗ from what it saw at first, so that Δ grows as exp(t/20,000)."""
    steps = 3000
    grads = jnp.broadcast_to(rank_one(), (steps, 6, 5))
    step_size = rms(updates_over_time(scale_by_came(), grads))
    t = np.arange(200, steps)
    start = np.sqrt((1 - 0.9**2) / (0.9**2 * 1e-4))
    np.testing.assert_allclose(step_size[t], start * np.exp(t / 20_000), rtol=1e-3)


def test_the_first_step_of_steady_came_and_those_under_noise():
    step_size = rms(updates_over_time(steady_came(1.0), noise(1000, (64, 64))))
    np.testing.assert_allclose(step_size[0], 1.54, rtol=0.01)
    assert step_size[0] == step_size.max()
    np.testing.assert_allclose(step_size[-1], 0.27, rtol=0.05)


@pytest.mark.parametrize(
    ("options", "bound"), [({}, 0.1**-0.5), ({"update_clipping_threshold": 1.0}, 1.0)]
)
def test_steady_came_in_a_constant_gradient_stays_bounded(options, bound):
    grads = jnp.broadcast_to(rank_one(), (20_000, 6, 5))
    step_size = rms(updates_over_time(steady_came(1.0, **options), grads))
    np.testing.assert_allclose(step_size[-1], bound, rtol=1e-3)


@pytest.mark.slow(but=1)
@pytest.mark.parametrize(("rows", "hit"), [(16, 1e-3), (256, 1e3)])
def test_one_hit_on_a_silent_row(rows, hit):
    """It moves by 109 learning rates in all, whatever its size.

    By 30 with Adam, and by less than half of that with steady_came: by 9 to 14.
    """
    quiet, after = 2000, 150
    grads = noise(quiet + after, (rows, 8)).at[:, 0].set(0.0).at[quiet, 0].set(hit)

    def distance(tx):
        row = updates_over_time(tx, grads)[:, 0]
        assert jnp.all(row[:quiet] == 0)
        return jnp.sum(row[quiet:], axis=0)

    # The momentum (1 − β1) β1ᵏ u, over a root that saw the hit, then m² at every step.
    b1, b3 = 0.9, 0.9999
    m = (1 - b1) * b1 ** np.arange(after)
    s = (1 - b3) * (b1**2 + np.cumsum(m**2) - m[0] ** 2)
    expected = np.sum(m / np.sqrt(s))
    np.testing.assert_allclose(expected, 109, rtol=0.005)
    np.testing.assert_allclose(distance(scale_by_came()), expected, rtol=0.02)
    with jax.numpy_dtype_promotion("standard"):
        adam = distance(optax.scale_by_adam())
    np.testing.assert_allclose(adam, 30, rtol=0.03)
    steady = -distance(steady_came(1.0)).mean()
    assert 9 < steady < 14


@pytest.mark.parametrize("threshold", [0.05, 5.0])
def test_update_clipping_threshold_bounds_each_leaf(threshold):
    """Δ / max(1, RMS(Δ) / c), leaf by leaf: first steps are 11.1 and, for vectors, 0.1.

    It acts on what comes out, so that the state is as without it.
    """
    steps = 100
    grads = {"matrix": noise(steps, (6, 5)), "vector": noise(steps, (7,))}
    plain = updates_over_time(scale_by_came(), grads)
    clipped = updates_over_time(
        scale_by_came(update_clipping_threshold=threshold), grads
    )

    def clip(updates):
        factor = 1 / np.maximum(1, rms(updates) / threshold)
        return updates * factor.reshape(-1, *(1 for _ in updates.shape[1:]))

    chex.assert_trees_all_close(clipped, jax.tree.map(clip, plain), rtol=1e-5)
    first = jax.tree.map(lambda updates: rms(updates)[0], clipped)
    expected = {"matrix": min(11.11, threshold), "vector": min(0.1, threshold)}
    chex.assert_trees_all_close(first, expected, rtol=1e-3)

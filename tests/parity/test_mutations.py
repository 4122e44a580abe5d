"""A wrong algorithm does not agree with came-pytorch."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

import came_optax
from came_optax import _algorithm as algorithm
from came_optax import _schedules as schedules
from tests.parity.histories import (
    PUBLISHED,
    disagreements,
    gradients,
    run_optax,
    training,
    trajectories,
    use_schedule,
)

pytestmark = pytest.mark.parity
HYPERPARAMETERS = algorithm.Hyperparameters
STATISTICS = {"v_row", "v_col", "s_row", "s_col"}
CONFIDENCE_ON = {"s_row", "s_col", "params"}
MOMENTUM_ON = {"mu"} | CONFIDENCE_ON
EVERYTHING = STATISTICS | MOMENTUM_ON


class Columns:
    """A rule that takes rows for columns."""

    def axes(self, path, shape):
        axes = came_optax.LastTwoAxes().axes(path, shape)
        return axes and came_optax.FactoredAxes(axes.col, axes.row)


def swapped(divide_by_root):
    def wrong(x, statistic, axes):
        if isinstance(statistic, algorithm.Factored):
            statistic = algorithm.Factored(statistic.col, statistic.row)
        return divide_by_root(x, statistic, axes)

    return wrong


def undivided(divide_by_root):
    def wrong(x, statistic, axes):
        if not isinstance(statistic, algorithm.Factored):
            return divide_by_root(x, statistic, axes)
        row = jnp.expand_dims(statistic.row, axes.col)
        col = jnp.expand_dims(statistic.col, axes.row)
        return x * jax.lax.rsqrt(row) * jax.lax.rsqrt(col)

    return wrong


def old_momentum(confide):
    def wrong(u, m, s, h, axes, seen=None):
        _, new, _ = confide(u, m, s, h, axes, seen)
        if s is not None:
            s = algorithm.average(s, algorithm.mean_square(u - m, h.eps2, axes), h.b3)
        delta = algorithm.trust(new, u, s, h, axes, seen)
        return algorithm.clip(delta, h.update_clip, axes), new, s

    return wrong


def hyper(**changes):
    """Returns a mutation that gives a half of the algorithm other hyperparameters."""

    def mutation(half):
        def wrong(*args):
            (i,) = (i for i, x in enumerate(args) if isinstance(x, HYPERPARAMETERS))
            h = args[i]
            new = {name: change(h) for name, change in changes.items()}
            return half(*args[:i], dataclasses.replace(h, **new), *args[i + 1 :])

        return wrong

    return mutation


def eps_outside(normalize):
    del normalize

    def wrong(g, v, h, axes, seen=None):
        new = algorithm.mean_square(g, 0 * h.eps1, axes)
        v = jax.tree.map(lambda x: x + h.eps1, algorithm.average(v, new, h.b2))
        u = algorithm.whiten(g, v, h, axes, seen)
        return algorithm.clip(u, h.clip, axes), v

    return wrong


# What is wrong, the function of the algorithm that is changed and how, and the arrays
# of a matrix that must disagree then.
MUTATIONS = {
    "nothing": ("clip", lambda clip: clip, set()),
    "row and column swapped": ("divide_by_root", swapped, MOMENTUM_ON),
    "no division by the mean": ("divide_by_root", undivided, MOMENTUM_ON),
    "no clip": ("clip", lambda clip: lambda u, *_: u, MOMENTUM_ON),
    "old momentum in the residual": ("confide", old_momentum, CONFIDENCE_ON),
    "no confidence": ("trust", lambda trust: lambda m, *_: m, {"params"}),
    "no ε1": ("normalize", hyper(eps1=lambda h: 0 * h.eps1), EVERYTHING),
    "no ε2": ("confide", hyper(eps2=lambda h: 0 * h.eps2), CONFIDENCE_ON),
    "ε outside the average": ("normalize", eps_outside, {"v_row", "v_col"}),
    "b1 for b3": ("confide", hyper(b3=lambda h: h.b1), CONFIDENCE_ON),
    "b3 for b2": ("normalize", hyper(b2=lambda h: h.b3), EVERYTHING),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_wrong_algorithm_disagrees(monkeypatch, name):
    function, mutation, must_disagree = MUTATIONS[name]
    use_schedule(monkeypatch, schedules.PLAIN)
    monkeypatch.setattr(algorithm, function, mutation(getattr(algorithm, function)))
    assert disagreements_of_a_matrix(came_optax.came).keys() == must_disagree


@pytest.mark.parametrize(
    ("options", "must_disagree"),
    [({"factoring": Columns()}, STATISTICS), ({"bias_correction": True}, MOMENTUM_ON)],
    ids=["row and column statistics swapped", "bias correction"],
)
def test_other_options_disagree(options, must_disagree):
    # The two roles of rows and columns enter the update alike: only the state can tell.
    came = functools.partial(came_optax.came, **options)
    assert disagreements_of_a_matrix(came).keys() == must_disagree


def disagreements_of_a_matrix(came):
    _, theirs = trajectories("sparse", 1.0, PUBLISHED)
    leaf = "(5, 5)"
    ours = run_optax(came, {leaf: gradients("sparse", 1.0, (5, 5))}, PUBLISHED)
    training.cache_clear()
    jax.clear_caches()
    return disagreements(ours[leaf], theirs[leaf])

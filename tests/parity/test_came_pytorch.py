"""Parameters and state after every step are those of came-pytorch 0.1.3."""

import pytest

import came_optax
from came_optax import _schedules as schedules
from tests.parity.histories import (
    OTHER,
    PUBLISHED,
    RUNS,
    SHAPES,
    disagreements,
    gradients,
    run_optax,
    trajectories,
    use_schedule,
)

pytestmark = pytest.mark.parity
SCHEDULES = {"plain": schedules.PLAIN, **schedules.BY_PLATFORM}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("kind", "scale", "hyperparameters"),
    RUNS,
    ids=[f"{k}-{s:g}-{'published' if h is PUBLISHED else 'other'}" for k, s, h in RUNS],
)
def test_parameters_and_state_agree(kind, scale, hyperparameters, shape):
    ours, theirs = trajectories(kind, scale, hyperparameters)
    leaf = str(shape)
    expected = {"params", "mu"} | (
        {"v_row", "v_col", "s_row", "s_col"} if len(shape) > 1 else {"v"}
    )
    assert theirs[leaf].keys() == expected
    assert not disagreements(ours[leaf], theirs[leaf])


@pytest.mark.parametrize("hyperparameters", [PUBLISHED, OTHER])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_each_schedule_agrees(monkeypatch, schedule, hyperparameters):
    use_schedule(monkeypatch, SCHEDULES[schedule])
    _, theirs = trajectories("sparse", 1.0, hyperparameters)
    grads = {str(shape): gradients("sparse", 1.0, shape) for shape in SHAPES}
    ours = run_optax(came_optax.came, grads, hyperparameters)
    for leaf in grads:
        assert not disagreements(ours[leaf], theirs[leaf]), leaf

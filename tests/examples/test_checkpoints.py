"""Checkpoints: complete or absent, and checked against what is to be restored."""

import shutil
import sys
import warnings
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import pytest

from pretraining.errors import UserError
from pretraining.training.checkpoints import Checkpoints
from pretraining.training.step import TrainState


def make_state(step: int, width: int = 3, dtype: str = "float32") -> TrainState:
    values = jnp.arange(width, dtype=dtype) + jnp.asarray(step, dtype)
    return TrainState(jnp.asarray(step), {"w": values}, (values, {"count": values[0]}))


@jax.jit
def init() -> TrainState:
    return make_state(0)


def test_the_newest_two_are_kept(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest_step is None
    for step in (2, 4, 4, 6):
        checkpoints.save(make_state(step), position=step)
    reopened = Checkpoints(tmp_path)
    chex.assert_trees_all_equal(reopened.restore(init), make_state(6))
    assert reopened.load_about()["position"] == 6
    folders = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert folders == ["4", "6"]


def test_a_half_written_one_is_never_chosen(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(make_state(2))
    folder = tmp_path / "checkpoints"
    shutil.copytree(folder / "2", folder / "4.orbax-checkpoint-tmp")
    assert Checkpoints(tmp_path, read_only=True).latest_step == 2
    reopened = Checkpoints(tmp_path)
    assert reopened.latest_step == 2
    reopened.save(make_state(4))
    chex.assert_trees_all_equal(reopened.restore(init), make_state(4))


def test_only_the_one_that_saves_removes_a_half_written_one(tmp_path: Path):
    Checkpoints(tmp_path).save(make_state(2))
    half = tmp_path / "checkpoints" / "4.orbax-checkpoint-tmp"
    half.mkdir()
    reader = Checkpoints(tmp_path, read_only=True)
    for _ in range(10):  # Time in which a removal would be over.
        assert reader.load_about()
    assert half.exists()
    Checkpoints(tmp_path).save(make_state(6))
    assert not half.exists()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (make_state(0, width=4), r"0 is float32\[3\] there and float32\[4\]"),
        (make_state(0, dtype="int32"), "int32"),
        (make_state(0)._replace(opt_state=()), "opt_state.* absent here"),
    ],
    ids=["shape", "dtype", "structure"],
)
def test_another_model_or_optimizer_is_refused(
    tmp_path: Path, other: TrainState, message: str
):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(make_state(2))
    with pytest.raises(UserError, match=message):
        checkpoints.restore(jax.jit(lambda: other))


@pytest.mark.parametrize("pattern", ["state/**/*", "about/metadata"])
def test_a_damaged_one_names_the_older(tmp_path: Path, pattern: str):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(make_state(2))
    checkpoints.save(make_state(4))
    for path in (tmp_path / "checkpoints" / "4").glob(pattern):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=r"4: damaged .* go on from step 2"):
        Checkpoints(tmp_path).restore(init)
    shutil.rmtree(tmp_path / "checkpoints" / "4")
    chex.assert_trees_all_equal(Checkpoints(tmp_path).restore(init), make_state(2))


def test_what_outlives_a_failed_save_is_not_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    reports: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", reports.append)
    Checkpoints(tmp_path)
    warnings.simplefilter("error")  # As in these tests, when the late one arrives.

    async def write_fragment():
        pass

    async def other():
        pass

    write_fragment()
    assert reports == []
    other()
    assert len(reports) == 1

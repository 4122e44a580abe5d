"""What is measured on an accelerator is measured, tried at a tiny size on the CPU."""

import json

import accelerator
import jax
import numpy as np
import pytest
from measuring.measurements import COLUMNS, Measurements

from came_optax import _schedules as schedules


@pytest.fixture
def found(monkeypatch, tmp_path):
    monkeypatch.setattr(accelerator, "ROUNDS", 2)
    monkeypatch.setattr(accelerator, "STEPS", 3)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield Measurements(tmp_path, device="cpu")


def test_all_is_measured_and_written(found):
    name = "steady_came, int4"
    accelerator.measure_copy(found, "nano")
    accelerator.measure_values(found, name, "nano")
    accelerator.measure_update(found, name, "nano")
    accelerator.measure_update(found, "AdamW", "nano")
    accelerator.measure_step(found, "AdamW", "nano", 2)
    found.fail("update of Muon", "no\nmemory")
    written = json.loads((found.folder / "accelerator.json").read_text())
    ours, adamw = written["rows"]
    assert ours["optimizer"] == name
    assert ours["error"] <= accelerator.LARGEST_ERROR
    assert ours["to AdamW"] == pytest.approx(
        ours["update (ms)"] / adamw["update (ms)"], abs=1e-3
    )
    assert adamw["bytes/parameter"] == 40
    assert set(COLUMNS) <= ours.keys() | adamw.keys()
    assert written["failed"] == ["update of Muon: no memory"]
    table = (found.folder / "accelerator.md").read_text()
    assert f"a copy moves {written['copy GB/s']} GB/s" in table
    assert "Failed: update of Muon: no memory" in table


def test_a_schedule_that_is_wrong_is_seen(found, monkeypatch):
    def confide(u, mu, s, *rest):
        delta, mu, s = schedules.PLAIN.confide(u, mu, s, *rest)
        return delta, mu, s and s._replace(row=1.001 * s.row)

    wrong = schedules.PLAIN._replace(confide=confide)
    monkeypatch.setitem(schedules.BY_PLATFORM, "cpu", wrong)
    accelerator.measure_values(found, "came, float32", "nano")
    assert found.failed


@pytest.mark.parametrize("wrong", [1e-3, np.nan])
def test_values_that_are_off_are_seen(wrong):
    expected = np.random.default_rng(0).standard_normal((8, 8), np.float32)
    off = expected.copy()
    off[3, 3] += wrong
    error, _ = accelerator.differences([off], [expected])
    assert not error <= accelerator.LARGEST_ERROR
    codes = np.arange(100, dtype=np.int8)
    assert accelerator.differences([codes[::-1]], [codes]) == (0.0, 1.0)

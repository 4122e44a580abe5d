"""Checkpoints: complete or absent, and checked against what is to be restored."""

import errno
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

from pretraining.errors import CannotSave, UserError
from pretraining.training import runs
from pretraining.training.checkpoints import Checkpoints
from pretraining.training.step import TrainState


def make_state(step: int, width: int = 3, dtype: str = "float32") -> TrainState:
    values = jnp.arange(width, dtype=dtype) + jnp.asarray(step, dtype)
    return TrainState(jnp.asarray(step), {"w": values}, (values, {"count": values[0]}))


def shapes() -> TrainState:
    return jax.jit(lambda: make_state(0)).eval_shape()


def test_the_newest_two_are_kept(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest_step is None
    for step in (2, 4, 4, 6):
        checkpoints.save(make_state(step), position=step)
    reopened = Checkpoints(tmp_path)
    chex.assert_trees_all_equal(reopened.restore(shapes()), make_state(6))
    assert reopened.load_about()["position"] == 6
    folders = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert folders == ["4", "6"]


@pytest.mark.parametrize("older", [(), (2,)])
def test_a_half_written_one_is_none(tmp_path: Path, older: tuple[int, ...]):
    checkpoints = Checkpoints(tmp_path)
    for step in older:
        checkpoints.save(make_state(step))
    half = tmp_path / "checkpoints" / "tmp-4"
    (half / "state.orbax-checkpoint-tmp").mkdir(parents=True)
    assert runs.steps(tmp_path) == list(older)
    checkpoints.save(make_state(4))
    assert not half.exists()
    chex.assert_trees_all_equal(Checkpoints(tmp_path).restore(shapes()), make_state(4))


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
        checkpoints.restore(jax.jit(lambda: other).eval_shape())


def damaging(path: Path) -> Iterator[str]:
    """Damages a file in each way and yields how."""
    content = path.read_bytes()
    for name, changed in (
        ("cut", content[: len(content) // 2]),
        ("empty", b""),
        ("bit", bytes([content[0] ^ 4]) + content[1:]),
        ("last bit", content[:-1] + bytes([content[-1] ^ 64])),
        ("zeros", bytes(len(content))),
        ("absent", None),
    ):
        if changed == content:
            continue
        path.unlink()
        if changed is not None:
            path.write_bytes(changed)
        yield name
        path.write_bytes(content)


def test_whatever_is_damaged_is_named_and_so_is_the_older(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(make_state(2))
    checkpoints.save(make_state(4))
    newest = tmp_path / "checkpoints" / "4"
    files = [path for path in newest.rglob("*") if path.is_file()]
    assert {"about.json", "SHA256SUMS"} < {path.name for path in files}
    for path in files:
        for how in damaging(path):
            with pytest.raises(UserError) as caught:
                checkpoints.restore(shapes())
            message = str(caught.value)
            assert "4: damaged checkpoint (" in message, (path, how)
            assert message.endswith("go on from step 2, which is sound")
            assert "\n" not in message
    chex.assert_trees_all_equal(checkpoints.restore(shapes()), make_state(4))


def test_a_damaged_older_one_is_not_recommended(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path)
    for step in 2, 4:
        checkpoints.save(make_state(step))
        (tmp_path / "checkpoints" / str(step) / "about.json").write_text("{}")
    with pytest.raises(UserError, match="there is no other; begin anew"):
        checkpoints.restore(shapes())


def test_checksums_are_what_sha256sum_reads(tmp_path: Path):
    Checkpoints(tmp_path).save(make_state(2))
    command = ["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"]
    subprocess.run(command, cwd=tmp_path / "checkpoints" / "2", check=True)


def test_a_state_of_other_containers_is_restored(tmp_path: Path):
    """As when --weight-decay becomes 0: a transformation without a state is gone."""
    state = make_state(2)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state._replace(opt_state=(optax.EmptyState(), *state.opt_state)))
    other = state._replace(opt_state={"1": state.opt_state[0], "2": state.opt_state[1]})
    restored = checkpoints.restore(jax.jit(lambda: other).eval_shape())
    chex.assert_trees_all_equal(restored, other)


def test_a_full_disk_is_one_line_and_leaves_what_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(make_state(2))

    def fallocate(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", fallocate)
    with pytest.raises(CannotSave, match="cannot save step 4: No space left on device"):
        checkpoints.save(make_state(4))
    assert os.listdir(tmp_path / "checkpoints") == ["2"]


def test_saving_leaves_nothing_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    before = list(logging.getLogger("absl").filters), sys.unraisablehook
    Checkpoints(tmp_path).save(make_state(2))
    with monkeypatch.context() as broken:
        broken.setattr("orbax.checkpoint.Checkpointer.save", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            Checkpoints(tmp_path).save(make_state(4))
    assert (logging.getLogger("absl").filters, sys.unraisablehook) == before


SAVES_ON_A_DISK_THAT_FILLS = """
import resource
from pathlib import Path
import jax
from pretraining.errors import CannotSave
from pretraining.training import checkpoints
from pretraining.training.step import TrainState

checkpoints._reserve = lambda *_: None
saving = checkpoints.Checkpoints(Path())
noise = {str(k): jax.random.normal(jax.random.key(k), (500, 500)) for k in range(40)}
state = TrainState(jax.numpy.asarray(2), {}, ())
saving.save(state)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
try:
    saving.save(state._replace(step=state.step + 2, params=noise))
except CannotSave as error:
    print(error)
"""


def test_a_disk_that_fills_while_it_is_written_is_one_line_too(
    run_code: Any, tmp_path: Path
):
    # In a process of its own: pytest takes what threads report.
    process = run_code(SAVES_ON_A_DISK_THAT_FILLS)
    assert process.stdout == "checkpoints: cannot save step 4: File too large\n"
    assert process.stderr == ""
    assert os.listdir(tmp_path / "checkpoints") == ["2"]

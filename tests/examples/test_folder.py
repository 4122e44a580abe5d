"""A run's folder: one run at a time; checkpoints complete, checked, or absent."""

import errno
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

from running import folder
from running.folder import CannotSave, Checkpoints, RunOptions, claim
from task import UserError
from training.step import TrainState


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def make_state(step, width=3, dtype="float32"):
    values = jnp.arange(width, dtype=dtype) + jnp.asarray(step, dtype)
    return TrainState(jnp.asarray(step), {"w": values}, (values, {"count": values[0]}))


def shapes(state=None):
    return jax.jit(lambda: state or make_state(0)).eval_shape()


def test_two_runs_started_at_once_have_two_folders():
    with claim("name", RunOptions()) as first, claim("name", RunOptions()) as second:
        assert (str(first), str(second)) == ("runs/name-1", "runs/name-2")
        (second / "something").touch()
    assert os.listdir("runs") == ["name-2"]  # The other was empty.


def test_a_new_folder_is_removed_if_nothing_was_written():
    with pytest.raises(UserError), claim("name", RunOptions()):
        raise UserError("wrong")
    assert os.listdir() == []


def test_a_folder_in_use_is_refused_and_a_dead_run_does_not_block():
    options = RunOptions(output="mine/run")
    with claim("name", options):
        with pytest.raises(UserError, match=r"mine/run: another run is writing there"):
            with claim("name", options):
                pass
        Path("mine/run/metrics.jsonl").touch()
    command = (
        "import os, filelock; filelock.FileLock('mine/run/.lock').acquire(); "
        "os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", command], check=False)
    with claim("name", options):
        pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (RunOptions(output="file"), "file: cannot write there"),
        (RunOptions(output="/proc/run"), "/proc/run: cannot write there"),
        (RunOptions(output="new", resume=True), "new: no checkpoint to resume from"),
        (RunOptions(output="saved"), "saved: holds a run already"),
    ],
)
def test_what_cannot_be_claimed_is_refused_and_nothing_new_stays(options, message):
    Path("file").touch()
    Path("saved").mkdir()
    Checkpoints(Path("saved")).save(make_state(2))
    with pytest.raises(UserError, match=message):
        with claim("name", options):
            pass
    assert set(os.listdir()) == {"file", "saved"}


def test_the_last_run_that_saved_is_resumed():
    with pytest.raises(UserError, match="--resume: no run under runs/ to continue"):
        folder.latest("name")
    for number in 2, 10, 11:
        Path(f"runs/name-{number}").mkdir(parents=True)
        if number < 11:
            Checkpoints(Path(f"runs/name-{number}")).save(make_state(2))
    assert folder.latest("name") == Path("runs/name-10")


def test_the_newest_two_are_kept():
    checkpoints = Checkpoints(Path())
    for step in (2, 4, 4, 6):
        checkpoints.save(make_state(step), position=step)
    reopened = Checkpoints(Path())
    chex.assert_trees_all_equal(reopened.restore(shapes()), make_state(6))
    assert reopened.load_about()["position"] == 6
    assert sorted(os.listdir("checkpoints")) == ["4", "6"]


@pytest.mark.parametrize("older", [(), (2,)])
@pytest.mark.parametrize("half", ["4", "4.orbax-checkpoint-tmp"])
def test_a_half_written_one_is_none(half, older):
    checkpoints = Checkpoints(Path())
    for step in older:
        checkpoints.save(make_state(step))
    (Path("checkpoints") / half / "state").mkdir(parents=True)
    assert folder.steps(Path()) == list(older)
    checkpoints.save(make_state(4))
    assert sorted(os.listdir("checkpoints")) == [*map(str, older), "4"]
    chex.assert_trees_all_equal(Checkpoints(Path()).restore(shapes()), make_state(4))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (make_state(0, width=4), r"0 is float32\[3\] there and float32\[4\]"),
        (make_state(0, dtype="int32"), "int32"),
        (make_state(0)._replace(opt_state=()), "opt_state.* absent here"),
    ],
    ids=["shape", "dtype", "structure"],
)
def test_another_model_or_optimizer_is_refused(other, message):
    Checkpoints(Path()).save(make_state(2))
    with pytest.raises(UserError, match=message):
        Checkpoints(Path()).restore(shapes(other))


def test_a_state_of_other_containers_is_restored():
    """As when --weight-decay becomes 0: a transformation without a state is gone."""
    state = make_state(2)
    with_empty = state._replace(opt_state=(*state.opt_state, optax.EmptyState()))
    Checkpoints(Path()).save(with_empty)
    other = state._replace(opt_state={"0": state.opt_state[0], "1": state.opt_state[1]})
    restored = Checkpoints(Path()).restore(shapes(other))
    chex.assert_trees_all_equal(restored, other)


def _flip(content, at):
    return content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :]


def damaging(path):
    """Damages a file in each way and yields how."""
    content = path.read_bytes()
    for name, changed in (
        ("cut", content[: len(content) // 2]),
        ("empty", b""),
        ("bit", _flip(content, 0) if content else b"x"),
        ("middle bit", _flip(content, len(content) // 2) if content else b"y"),
        ("last bit", _flip(content, len(content) - 1) if content else b"z"),
        ("zeros", bytes(len(content))),
        ("noise", random.Random(0).randbytes(len(content))),
        ("a folder", None),
        ("absent", None),
    ):
        if changed == content or (name == "absent" and path.name == "SHA256SUMS"):
            continue  # Without its sums it isn't a checkpoint.
        path.unlink()
        if name == "a folder":
            path.mkdir()
        elif changed is not None:
            path.write_bytes(changed)
        yield name
        if name == "a folder":
            path.rmdir()
        path.write_bytes(content)


def test_whatever_is_damaged_is_named_and_so_is_the_older():
    checkpoints = Checkpoints(Path("run"))
    Path("run").mkdir()
    for step in 2, 4:
        checkpoints.save(make_state(step))
    files = [p for p in Path("run/checkpoints/4").rglob("*") if p.is_file()]
    assert {"metadata", "SHA256SUMS"} < {path.name for path in files}
    for path in files:
        for how in damaging(path):
            with pytest.raises(UserError) as caught:
                checkpoints.restore(shapes())
            message = str(caught.value)
            assert "run/checkpoints/4: damaged checkpoint (" in message, (path, how)
            assert message.endswith("that folder to go on from step 2, which is sound")
            assert "\n" not in message
    chex.assert_trees_all_equal(checkpoints.restore(shapes()), make_state(4))
    shutil.rmtree("run/checkpoints/4")  # What the line says works.
    chex.assert_trees_all_equal(checkpoints.restore(shapes()), make_state(2))


def test_a_damaged_older_one_is_not_recommended():
    for step in 2, 4:
        Checkpoints(Path()).save(make_state(step))
        Path(f"checkpoints/{step}/about/metadata").write_text("{}")
    with pytest.raises(UserError, match="there is no other; begin anew"):
        Checkpoints(Path()).restore(shapes())


def test_checksums_are_what_sha256sum_reads():
    Checkpoints(Path()).save(make_state(2))
    command = ["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"]
    subprocess.run(command, cwd="checkpoints/2", check=True)


def test_a_full_disk_is_one_line_and_leaves_what_is_saved(monkeypatch):
    Checkpoints(Path()).save(make_state(2))

    def fallocate(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", fallocate)
    with pytest.raises(CannotSave, match="cannot save step 4: No space left on device"):
        Checkpoints(Path()).save(make_state(4))
    assert os.listdir("checkpoints") == ["2"]

"""Checkpoints: parameters, optimizer state, step, data position, options.

One is a folder `<run>/checkpoints/<step>`: the arrays in `state` as Orbax writes them,
`about.json`, and the checksums of all files in `SHA256SUMS`, which `sha256sum -c` reads
too. It is written under another name and renamed when whole, and an older one dropped
only then: what is there is complete, whenever the process dies.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

import came_optax
from pretraining.errors import CannotSave, UserError
from pretraining.training import runs
from pretraining.training.devices import is_first_process
from pretraining.training.step import TrainState

KEPT = 2
ABOUT, SUMS = "about.json", "SHA256SUMS"


class OtherState(UserError):
    """A checkpoint whose arrays are not those that are wanted."""


class Checkpoints:
    """The checkpoints of one run, in `<run>/checkpoints`; the newest two are kept.

    The run's folder has to be locked by this process, or by the first one of several.
    """

    def __init__(self, run: Path):
        self._run = run
        self._folder = run / "checkpoints"

    @property
    def latest_step(self) -> int | None:
        """The step of the newest checkpoint."""
        return max(runs.steps(self._run), default=None)

    def save(self, state: TrainState, **about: Any) -> None:
        """Saves the state and `about`, which is JSON, unless that step is saved.

        Raises:
            CannotSave: The folder is full or not writable. Older checkpoints stay.
        """
        step = int(state.step)
        if step in runs.steps(self._run):
            return
        about |= {"layout": _layout(state), "version": came_optax.__version__}
        try:
            self._write(step, state, about)
        except (OSError, ValueError) as error:  # TensorStore raises ValueError.
            raise CannotSave(
                f"{self._folder}: cannot save step {step}: {_reason(error)}"
            ) from error

    def load_about(self) -> dict[str, Any]:
        """Returns what the newest checkpoint says about its run.

        Raises:
            UserError: It is damaged.
        """
        self._check(ABOUT)
        path = self._folder / str(self.latest_step) / ABOUT
        about: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return about

    def restore(self, state: TrainState) -> TrainState:
        """Returns the newest state.

        Args:
            state: Shapes, dtypes and shardings, as `step.state_shapes` returns them.

        Raises:
            UserError: It is damaged.
            OtherState: It is of another model or optimizer.
        """
        self._check()
        about = self.load_about()
        saved, wanted = about["layout"], _layout(state)
        folder = self._folder / str(self.latest_step)
        for name in sorted(saved.keys() | wanted.keys()):
            if saved.get(name) != wanted.get(name):
                by = f" by came-optax {about['version']}"
                raise OtherState(
                    f"{folder}: of another model or optimizer"
                    f"{by if about['version'] != came_optax.__version__ else ''}: "
                    f"{name} is {saved.get(name, 'absent')} there and "
                    f"{wanted.get(name, 'absent')} here"
                )
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
            restored = checkpointer.restore(
                folder.absolute() / "state",
                args=ocp.args.StandardRestore(_nested(state)),
            )
        leaves = {_name(path): x for path, x in jax.tree.leaves_with_path(restored)}
        restored_state: TrainState = jax.tree.unflatten(
            jax.tree.structure(state), [leaves[name] for name in wanted]
        )
        return restored_state

    def _write(self, step: int, state: TrainState, about: Mapping[str, Any]) -> None:
        temporary = self._folder / f"tmp-{step}"
        try:
            if is_first_process():
                for left in self._folder.glob("tmp-*"):  # By a process that died.
                    shutil.rmtree(left)
                temporary.mkdir(parents=True)
                _reserve(temporary, sum(x.nbytes for x in jax.tree.leaves(state)))
            _wait_for_all(f"before saving {step}")
            with (
                _silent_threads(),
                ocp.Checkpointer(_in_one_transaction()) as checkpointer,
            ):
                checkpointer.save(
                    temporary.absolute() / "state",
                    args=ocp.args.PyTreeSave(_nested(state)),
                )
            if is_first_process():
                content = json.dumps(about, indent=1) + "\n"
                (temporary / ABOUT).write_text(content, encoding="utf-8")
                (temporary / SUMS).write_text(_checksums(temporary), encoding="utf-8")
                temporary.rename(self._folder / str(step))
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)  # A full disk needs the place.
            raise
        if is_first_process():
            for old in runs.steps(self._run)[:-KEPT]:
                # Renamed first, as it is no checkpoint any more when half is gone.
                dropped = self._folder / f"tmp-{old}"
                (self._folder / str(old)).rename(dropped)
                shutil.rmtree(dropped)
        _wait_for_all(f"saved {step}")

    def _check(self, *names: str) -> None:
        """Raises UserError if the newest checkpoint is damaged, and says what is not.

        Args:
            *names: The files to look at; by default all.
        """
        newest, *older = reversed(runs.steps(self._run))
        folder = self._folder / str(newest)
        if (found := damage(folder, *names)) is None:
            return
        sound = [step for step in older if damage(self._folder / str(step)) is None]
        way_on = (
            f"delete that folder to go on from step {sound[0]}, which is sound"
            if sound
            else "there is no other; begin anew with another --output"
        )
        raise UserError(f"{folder}: damaged checkpoint ({found}); {way_on}")


def damage(checkpoint: Path, *names: str) -> str | None:
    """Returns what is wrong with a checkpoint's files, None if nothing is.

    Args:
        checkpoint: Its folder.
        *names: The files to look at; by default all.
    """
    name = SUMS
    try:
        lines = (checkpoint / SUMS).read_text(encoding="utf-8").splitlines()
        sums = {file: digest for digest, _, file in (s.partition("  ") for s in lines)}
        if next(reversed(sums), None) != ABOUT:  # Written last.
            return f"{SUMS} is incomplete"
        for name in names or sums:
            if _digest(checkpoint / name) != sums[name]:
                return f"{name} has changed"
    except (OSError, ValueError) as error:
        return f"{name}: {getattr(error, 'strerror', None) or 'not readable'}"
    return None


def _checksums(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    files.sort(key=lambda path: path.name == ABOUT)  # Last.
    return "".join(
        f"{_digest(path)}  {path.relative_to(folder).as_posix()}\n" for path in files
    )


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _reserve(folder: Path, size: int) -> None:
    """Raises OSError unless a file of that size fits.

    Asked first: there is no use in filling a disk with half a checkpoint.
    """
    if hasattr(os, "posix_fallocate"):
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, size)


def _in_one_transaction() -> ocp.CheckpointHandler:
    """Returns a handler that writes all arrays at once: they fail at once, if at all.

    Orbax does so where no limit is set to what is being written. Of arrays on their
    own, each that fails later than the first reports it on stderr.
    """
    return ocp.PyTreeCheckpointHandler(handler_impl=ocp.BasePyTreeCheckpointHandler())


@contextlib.contextmanager
def _silent_threads() -> Iterator[None]:
    """Keeps Orbax's threads from logging, each by itself, what saving raises anyway."""
    logger, this = logging.getLogger("absl"), threading.get_ident()

    def of_this_thread(record: logging.LogRecord) -> bool:
        return record.thread == this

    logger.addFilter(of_this_thread)
    try:
        yield
    finally:
        logger.removeFilter(of_this_thread)


def _wait_for_all(what: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _layout(state: TrainState) -> dict[str, str]:
    """Describes each leaf, e.g. {"params/wte/embedding": "float32[2048,128]"}."""
    return {
        _name(path): f"{leaf.dtype}{list(leaf.shape)}".replace(" ", "")
        for path, leaf in jax.tree.leaves_with_path(state)
    }


def _nested(state: TrainState) -> dict[str, Any]:
    """Returns the leaves in dicts alone: containers without leaves are no matter."""
    tree: dict[str, Any] = {}
    for path, leaf in jax.tree.leaves_with_path(state):
        *inner, last = _name(path).split("/")
        place = tree
        for key in inner:
            place = place.setdefault(key, {})
        place[last] = leaf
    return tree


def _reason(error: Exception) -> str:
    """Finds the few words that matter in TensorStore's message."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    code = re.search(r"os_error_code='(\d+)'", str(error))
    if code:
        return os.strerror(int(code[1]))
    return str(error).partition("\n")[0][:200]

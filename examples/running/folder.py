"""A run's folder: `runs/<name>-1`, `runs/<name>-2`, ... unless --output names one.

A run locks it while it lives; the kernel drops the lock of a process that dies. In
`checkpoints/<step>` are parameters, optimizer state, step, data position and options.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock
import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

import came_optax
from running import checksums
from task import UserError
from training import sharding
from training.step import TrainState

ROOT = Path("runs")
LOCK = ".lock"
ABOUT = "about/metadata"


class CannotSave(UserError):
    """A checkpoint could not be written."""


class OtherState(UserError):
    """A checkpoint whose arrays are not those that are wanted."""


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """Options for the run's folder.

    Attributes:
        output: Folder for all that is written; by default a new one under runs/.
        resume: Continue the run in --output (by default the last under runs/) with the
            options that it was started with.
    """

    output: str | None = None
    resume: bool = False


@contextlib.contextmanager
def claim(name: str, options: RunOptions) -> Iterator[Path]:
    """Makes or reopens a run's folder and keeps other runs out of it meanwhile.

    A new folder in which nothing was written is removed in the end. What stops a run
    from outside leaves with a note of how to continue it.

    Args:
        name: Names the folder, if --output does not.
        options: The options.

    Raises:
        UserError: It cannot be written, belongs to a run that goes on, or holds one
            that is not to be resumed, or none that could be.
    """
    with contextlib.ExitStack() as stack:

        def open_folder() -> str:
            folder = Path(options.output or ROOT)
            try:
                new = options.output is None or not folder.exists()
                if options.output is None:
                    folder = _make_next(name)
                folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(filelock.FileLock(folder / LOCK, timeout=0))
                if new:
                    stack.callback(_remove_empty, folder)
            except filelock.Timeout:
                raise UserError(
                    f"{folder}: another run is writing there; choose another --output"
                ) from None
            except OSError as error:
                raise UserError(
                    f"{folder}: cannot write there: {error.strerror}"
                ) from error
            saved = steps(folder)
            if saved and not options.resume:
                raise UserError(
                    f"{folder}: holds a run already; continue it by --resume or choose "
                    "another --output"
                )
            if options.resume and not saved:
                raise UserError(
                    f"{folder}: no checkpoint to resume from; without --resume it "
                    "begins anew"
                )
            return str(folder)

        folder = Path(sharding.ask_first(open_folder))
        try:
            yield folder
        except (KeyboardInterrupt, OSError, CannotSave) as error:
            if saved := steps(folder):
                script = str(Path(sys.argv[0]).absolute())
                command = [sys.executable, script, "--resume", "--output", str(folder)]
                error.add_note(
                    f"step {saved[-1]} is saved in {folder}\nContinue: cd "
                    f"{shlex.quote(os.getcwd())} && {shlex.join(command)}"
                )
            raise


def steps(folder: Path) -> list[int]:
    """Returns the steps of a run's checkpoints, the newest last."""
    sums = (folder / "checkpoints").glob(f"*/{checksums.SUMS}")
    names = (path.parent.name for path in sums)
    return sorted(int(name) for name in names if name.isdecimal())


def latest(name: str) -> Path:
    """Returns the last run folder of that name that has a checkpoint.

    Raises:
        UserError: There is none.
    """
    for number in reversed(_numbers(name)):
        if steps(folder := ROOT / f"{name}-{number}"):
            return folder
    raise UserError(
        f"--resume: no run under {ROOT}/ to continue; name one by --output FOLDER"
    )


class Checkpoints:
    """The checkpoints of one run, in `<run>/checkpoints`; the newest two are kept.

    The run's folder has to be locked by this process, or by the first one of several.
    """

    def __init__(self, run: Path):
        self._run = run
        self._folder = (run / "checkpoints").absolute()

    def save(self, state: TrainState, **about: Any) -> None:
        """Saves the state and `about`, which is JSON, unless that step is saved.

        Raises:
            CannotSave: The folder is full or not writable. Older checkpoints stay.
        """
        step = int(state.step)
        if step in steps(self._run):
            return
        leaves = _leaves(state)
        about |= {"layout": _layout(leaves), "version": came_optax.__version__}
        try:
            if jax.process_index() == 0:
                self._make_room(sum(x.nbytes for x in leaves.values()))
            with self._manager() as manager:
                items = ocp.args.Composite(
                    state=ocp.args.StandardSave(leaves), about=ocp.args.JsonSave(about)
                )
                manager.save(step, args=items)
            if jax.process_index() == 0:
                checksums.write(self._folder / str(step))
        except (OSError, ValueError) as error:  # TensorStore raises ValueError.
            raise CannotSave(
                f"{self._run / 'checkpoints'}: cannot save step {step}: "
                f"{_reason(error)}"
            ) from error
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"saved {step}")

    def load_about(self) -> dict[str, Any]:
        """Returns what the newest checkpoint says about its run.

        Raises:
            UserError: It is damaged.
        """
        self._check(ABOUT)
        path = self._folder / str(steps(self._run)[-1]) / ABOUT
        return json.loads(path.read_text(encoding="utf-8"))

    def restore(self, state: TrainState) -> TrainState:
        """Returns the newest state.

        Args:
            state: Shapes, dtypes and shardings, as `step.state_shapes` returns them.

        Raises:
            UserError: It is damaged.
            OtherState: It is of another model or optimizer.
        """
        self._check()
        about, step = self.load_about(), steps(self._run)[-1]
        leaves = _leaves(state)
        saved, wanted = about["layout"], _layout(leaves)
        for name in sorted(saved.keys() | wanted.keys()):
            if saved.get(name) != wanted.get(name):
                by = f" by came-optax {about['version']}"
                raise OtherState(
                    f"{self._run}: step {step} is of another model or optimizer"
                    f"{by if about['version'] != came_optax.__version__ else ''}: "
                    f"{name} is {saved.get(name, 'absent')} there and "
                    f"{wanted.get(name, 'absent')} here"
                )
        with self._manager() as manager:
            items = ocp.args.Composite(state=ocp.args.StandardRestore(leaves))
            restored = manager.restore(step, args=items)["state"]
        in_order = [restored[name] for name in leaves]
        return jax.tree.unflatten(jax.tree.structure(state), in_order)

    def _manager(self) -> ocp.CheckpointManager:
        # Not in the background: the next step donates the arrays.
        options = ocp.CheckpointManagerOptions(
            max_to_keep=2, enable_async_checkpointing=False
        )
        return ocp.CheckpointManager(self._folder, options=options)

    def _check(self, *names: str) -> None:
        """Raises UserError if the newest one is damaged, and says which one is not."""
        newest, *older = reversed(steps(self._run))
        folder = self._run / "checkpoints" / str(newest)
        if (found := checksums.damage(folder, *names)) is None:
            return
        sound = [s for s in older if not checksums.damage(self._folder / str(s))]
        way_on = (
            f"delete that folder to go on from step {sound[0]}, which is sound"
            if sound
            else "there is no other; begin anew with another --output"
        )
        raise UserError(f"{folder}: damaged checkpoint ({found}); {way_on}")

    def _make_room(self, size: int) -> None:
        """Removes what a killed run left; raises OSError if that size doesn't fit.

        There is no use in filling a disk with half a checkpoint.
        """
        self._folder.mkdir(exist_ok=True)
        for path in self._folder.iterdir():
            if path.name not in map(str, steps(self._run)):
                shutil.rmtree(path)
        if hasattr(os, "posix_fallocate"):
            with tempfile.TemporaryFile(dir=self._folder) as file:
                os.posix_fallocate(file.fileno(), 0, size)


def _make_next(name: str) -> Path:
    """Makes a folder that no other process has made."""
    for number in itertools.count(max(_numbers(name), default=0) + 1):
        with contextlib.suppress(FileExistsError):
            (folder := ROOT / f"{name}-{number}").mkdir(parents=True)
            return folder
    raise AssertionError("unreachable")


def _numbers(name: str) -> list[int]:
    suffixes = (path.name.removeprefix(f"{name}-") for path in ROOT.glob(f"{name}-*"))
    return sorted(int(suffix) for suffix in suffixes if suffix.isdecimal())


def _remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):  # It isn't there, or has something in it.
        (folder / LOCK).unlink(missing_ok=True)
        folder.rmdir()
        ROOT.rmdir()


def _leaves(state: TrainState) -> dict[str, Any]:
    """Returns arrays by name: containers without any in them are no matter."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree.leaves_with_path(state)
    }


def _layout(leaves: dict[str, Any]) -> dict[str, str]:
    """Describes each leaf, e.g. {"params.wte.embedding": "float32[2048,128]"}."""
    return {
        name: f"{leaf.dtype}{list(leaf.shape)}".replace(" ", "")
        for name, leaf in leaves.items()
    }


def _reason(error: Exception) -> str:
    """Finds the few words that matter in TensorStore's message."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    code = re.search(r"os_error_code='(\d+)'", str(error))
    return os.strerror(int(code[1])) if code else str(error).partition("\n")[0][:200]

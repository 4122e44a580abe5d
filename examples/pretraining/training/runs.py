"""Run folders: `runs/<name>-1`, `runs/<name>-2`, ... unless --output names one.

A run locks its folder while it lives. The kernel drops the lock of a process that dies,
however it does.
"""

import contextlib
import dataclasses
import datetime
import fcntl
import os
import shlex
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from pretraining.errors import CannotSave, UserError
from pretraining.files import remove_left
from pretraining.options import option, utf8
from pretraining.training import devices, interrupts

ROOT = Path("runs")
LOCK = ".lock"


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """Options for the run's folder."""

    output: str | None = option(
        None,
        "folder for all that is written (default: a new one under runs/)",
        type=utf8,  # Orbax takes no other.
        metavar="FOLDER",
    )
    resume: bool = option(
        False,
        "continue the run in --output (default: the last under runs/) with the options "
        "that it was started with",
    )


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
            try:
                folder = stack.enter_context(_folder(name, options))
                stack.enter_context(_locked(folder))
                remove_left(folder)
                for left in folder.glob("checkpoints/tmp-*"):
                    shutil.rmtree(left)
            except OSError as error:
                place = options.output or error.filename or ROOT
                raise UserError(
                    f"{place}: cannot write there: {error.strerror}"
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

        def leave() -> str:
            stack.close()
            return _way_on(folder)

        folder = Path(devices.ask_first(open_folder))
        try:
            with interrupts.before_quitting(leave):
                yield folder
        except (KeyboardInterrupt, OSError, CannotSave) as error:
            if way_on := _way_on(folder):
                error.add_note(way_on)
            raise


def steps(folder: Path) -> list[int]:
    """Returns the steps of a run's checkpoints, the newest last."""
    names = (path.name for path in (folder / "checkpoints").glob("*"))
    return sorted(int(name) for name in names if name.isdecimal())


def latest(name: str) -> Path:
    """Returns the last run folder of that name.

    Raises:
        UserError: There is none.
    """
    number = _latest_number(name)
    if number == 0:
        raise UserError(f"--resume: no run under {ROOT}/; name one by --output FOLDER")
    return ROOT / f"{name}-{number}"


@contextlib.contextmanager
def _folder(name: str, options: RunOptions) -> Iterator[Path]:
    """Yields the folder; if it is new and stays empty, removes it."""
    if options.output is not None:
        folder = Path(options.output)
        new = [p for p in (folder, *folder.parents) if not p.exists()]
        folder.mkdir(parents=True, exist_ok=True)
    else:
        new = [ROOT] if not ROOT.exists() else []
        ROOT.mkdir(exist_ok=True)
        folder = _make_next(name)
        new.insert(0, folder)
    try:
        yield folder
    finally:
        if new and set(os.listdir(folder)) <= {LOCK}:
            (folder / LOCK).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # Another run's folder is in it.
                for path in new:
                    path.rmdir()


def _make_next(name: str) -> Path:
    """Makes a folder that no other process has made."""
    number = _latest_number(name)
    while True:
        number += 1
        folder = ROOT / f"{name}-{number}"
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            return folder


def _latest_number(name: str) -> int:
    suffixes = (path.name.removeprefix(f"{name}-") for path in ROOT.glob(f"{name}-*"))
    return max((int(suffix) for suffix in suffixes if suffix.isdecimal()), default=0)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    # The file stays: were it removed, two could each lock one of that name.
    with (folder / LOCK).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{folder}: {_holder(file)} is writing there; choose another --output"
            ) from None
        now = datetime.datetime.now().isoformat(" ", "seconds")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {now}")
        file.flush()
        yield


def _holder(file: TextIO) -> str:
    file.seek(0)
    return file.read() or "another run"


def _way_on(folder: Path) -> str:
    """Says what is saved, if anything is, and gives a command for any shell here."""
    if not (saved := steps(folder)):
        return ""
    script = Path(sys.argv[0]).absolute()
    command = [sys.executable, str(script), "--resume", "--output", str(folder)]
    return (
        f"step {saved[-1]} is saved in {folder}\n"
        f"Continue: cd {shlex.quote(os.getcwd())} && {shlex.join(command)}"
    )

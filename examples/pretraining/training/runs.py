"""Run folders: `runs/<name>-1`, `runs/<name>-2`, ... unless --output names one."""

import dataclasses
import tempfile
from pathlib import Path

from pretraining.errors import UserError
from pretraining.options import option

ROOT = Path("runs")


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """Options for the run's folder."""

    output: str | None = option(
        None,
        "folder for all that is written (default: a new one under runs/)",
        metavar="FOLDER",
    )
    resume: bool = option(
        False,
        "continue the run in --output (default: the last under runs/) with the options "
        "that it was started with",
    )


def latest(name: str) -> Path:
    """Returns the last run folder of that name.

    Raises:
        UserError: There is none.
    """
    number = _latest_number(name)
    if number == 0:
        raise UserError(f"--resume: no run under {ROOT}/; name one by --output FOLDER")
    return ROOT / f"{name}-{number}"


def next_free(name: str) -> Path:
    """Returns a run folder of that name that is not there yet."""
    return ROOT / f"{name}-{_latest_number(name) + 1}"


def prepare(folder: Path, *, resume: bool) -> None:
    """Makes the folder of a new run, or checks that there is one to resume.

    Raises:
        UserError: It cannot be written, or holds a run that is not to be resumed.
    """
    saved = any((folder / "checkpoints").glob("[0-9]*"))
    if saved and not resume:
        raise UserError(
            f"{folder}: holds a run already; continue it by --resume or choose "
            "another --output"
        )
    if resume and not saved:
        raise UserError(f"{folder}: no checkpoint to resume from")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{folder}: cannot write there: {error.strerror}") from error


def _latest_number(name: str) -> int:
    suffixes = (path.name.removeprefix(f"{name}-") for path in ROOT.glob(f"{name}-*"))
    return max((int(suffix) for suffix in suffixes if suffix.isdecimal()), default=0)

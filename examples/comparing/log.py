"""A study's folder: a line for each finished run, and which runs are taken.

Any number of processes may share it. A line is there as a whole or not at all. A run is
taken for as long as its process lives: the lock on its file goes with it, and what the
run had saved stays.
"""

import contextlib
import fcntl
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from comparing.protocol import Run


def read(path: Path) -> dict[str, Mapping[str, Any]]:
    """Returns the finished runs by key."""
    if not path.exists():
        return {}
    text = path.read_text(encoding="utf-8")
    rows = map(json.loads, text[: text.rfind("\n") + 1].splitlines())
    return {
        Run(row["part"], row["optimizer"], row["settings"], row["seed"]).key: row
        for row in rows
    }


def losses(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Returns final losses, infinite where training diverged."""
    return {
        key: math.inf if row["loss"] is None else row["loss"]
        for key, row in rows.items()
    }


def append(path: Path, row: Mapping[str, Any]) -> None:
    """Adds a line, in place of one that a crash left unfinished."""
    with path.open("ab+", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        whole = file.read().rfind(b"\n") + 1
        os.ftruncate(file.fileno(), whole)
        file.write(json.dumps(row).encode() + b"\n")
        os.fsync(file.fileno())


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a path to write to; what was written takes the place of `path`."""
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def claim(folder: Path, run: Run) -> Iterator[Path | None]:
    """Yields where the run may save its state, None if another process has it."""
    folder.mkdir(parents=True, exist_ok=True)
    name = hashlib.sha256(run.key.encode()).hexdigest()[:16]
    with (folder / f"{name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        yield folder / f"{name}.npz"

"""Measurements as JSON lines, each on disk as soon as it is made."""

import contextlib
import json
import pathlib
import time
from collections.abc import Iterator
from typing import Any

SIZES = ("nano", "full")


class Skipped(Exception):
    """Something is not installed, or does not fit: no failure."""


class Recorder:
    """Appends what a job measures to a file, and prints it.

    Args:
        path: The file of JSON lines.
        job: Names the job, "part" or "part: case".
        size: "full", or "nano" to try the code where there is no accelerator.
        seconds: What the job may take.
    """

    def __init__(
        self, path: pathlib.Path, job: str, size: str = "full", seconds: float = 600
    ):
        self.path, self.job, self.size = path, job, size
        self._began = time.monotonic()
        self._deadline = self._began + seconds

    @property
    def nano(self) -> bool:
        """Whether this only tries the code."""
        return self.size == "nano"

    def seconds_left(self) -> float:
        """Returns the seconds until the job will be ended."""
        return self._deadline - time.monotonic()

    def write(self, **row: Any) -> None:
        """Appends a row."""
        took = round(time.monotonic() - self._began, 1)
        part = self.job.partition(":")[0]
        row = {"part": part, "job": self.job} | row | {"size": self.size, "at": took}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        print(f"[{took:6.1f} s] {_short(row)}", flush=True)

    @contextlib.contextmanager
    def attempt(self, **case: Any) -> Iterator[None]:
        """Makes a row of an exception, so that what comes next is still measured."""
        try:
            yield
        except Skipped as reason:
            self.write(**case, skipped=str(reason))
        except Exception as error:
            self.write(**case, failed=describe(error))

    def earlier(self) -> list[dict[str, Any]]:
        """Returns the rows of this size so far, those of other jobs included."""
        return [row for row in read(self.path) if row["size"] == self.size]


def describe(error: BaseException) -> str:
    """Returns an exception in a line of bounded length."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 600 else f"{text[:400]} … {text[-199:]}"


def read(path: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the rows of a file, without one that a kill cut short."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _short(row: dict[str, Any]) -> str:
    shown = {
        name: f"{value:.5g}" if isinstance(value, float) else value
        for name, value in row.items()
        if name not in ("part", "size", "at") and not isinstance(value, list | dict)
    }
    return "  ".join(f"{name} {value}" for name, value in shown.items())

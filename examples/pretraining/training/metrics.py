"""Metrics of a run: metrics.jsonl for programs, TensorBoard for people."""

import contextlib
import json
from pathlib import Path
from typing import Any, Self

import tensorboardX

from pretraining.files import write_atomically


class MetricsWriter:
    """Appends to `<run>/metrics.jsonl` and to the events in `<run>/tensorboard`.

    Args:
        run: The run's folder.
        step: Where the run goes on. What an interrupted one wrote past it is dropped,
            so that each step is there once.
        enabled: Whether to write at all; only one of several processes may.
    """

    def __init__(self, run: Path, step: int, *, enabled: bool = True):
        self._stack = contextlib.ExitStack()
        self._file = None
        if not enabled:
            return
        path = run / "metrics.jsonl"
        kept = [row for row in read(run) if row["step"] <= step]
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = self._stack.enter_context(path.open("a", encoding="utf-8"))
        self._events = tensorboardX.SummaryWriter(
            str(run / "tensorboard"), purge_step=step + 1, write_to_disk=True
        )
        self._stack.callback(self._events.close)

    def write(self, step: int, **metrics: float) -> None:
        """Writes the metrics of a step."""
        if self._file is None:
            return
        self._file.write(json.dumps({"step": step} | metrics) + "\n")
        self._file.flush()
        for name, value in metrics.items():
            self._events.add_scalar(name, value, step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()


def read(run: Path) -> list[dict[str, Any]]:
    """Returns the rows written so far, passing over what is not a row.

    A kill cuts one short, a crash of the machine may leave NUL bytes; nothing but the
    curve is lost by them.
    """
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows.append(row)
    return rows

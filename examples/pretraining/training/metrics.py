"""Metrics of a run: metrics.jsonl for programs, TensorBoard for people."""

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
        self._file = self._events = None
        if not enabled:
            return
        path = run / "metrics.jsonl"
        kept = [row for row in read(run) if row["step"] <= step]
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = path.open("a", encoding="utf-8")
        self._events = tensorboardX.SummaryWriter(
            str(run / "tensorboard"), purge_step=step + 1, write_to_disk=True
        )

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
        if self._file is not None:
            self._file.close()
            self._events.close()


def read(run: Path) -> list[dict[str, Any]]:
    """Returns the rows written so far, without one that a kill cut short."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]

"""Metrics of a run: metrics.jsonl for programs, TensorBoard for people."""

import contextlib
import json
import socket
import time
from pathlib import Path
from typing import Any, Self

from tensorboardX import RecordWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from pretraining.files import naming, write_atomically


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
        self._path = run / "metrics.jsonl"
        kept = [row for row in read(run) if row["step"] <= step]
        write_atomically(self._path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = self._stack.enter_context(self._path.open("a", encoding="utf-8"))
        # Not a SummaryWriter: its thread would report a full disk by itself.
        folder = run / "tensorboard"
        folder.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}"
        self._events = RecordWriter(str(folder / name))
        self._stack.callback(self._events.close)
        self._add_event(file_version="brain.Event:2")
        # TensorBoard hides what an interrupted run wrote past it.
        self._add_event(step=step + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, **metrics: float) -> None:
        """Writes the metrics of a step."""
        if self._file is None:
            return
        with naming(self._path):
            self._file.write(json.dumps({"step": step} | metrics) + "\n")
            self._file.flush()
            for name, value in metrics.items():
                self._add_event(step=step, summary=scalar(name, value))
            self._events.flush()

    def _add_event(self, **fields: Any) -> None:
        event = Event(wall_time=time.time(), **fields)
        self._events.write(event.SerializeToString())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, *exception: object) -> None:
        # What went wrong first is what there is to tell.
        with contextlib.suppress(*([OSError] if kind else [])):
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

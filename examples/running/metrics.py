"""What a run leaves to read: metrics.jsonl, TensorBoard, curve.png, summary.json."""

import contextlib
import dataclasses
import json
import os
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import matplotlib
from tensorboardX import RecordWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

matplotlib.use("Agg")
import matplotlib.pyplot as plt


class MetricsWriter:
    """Appends to `<run>/metrics.jsonl` and to the events in `<run>/tensorboard`.

    Args:
        run: The run's folder.
        step: Where the run goes on. What an interrupted one wrote past it is dropped,
            so that each step is there once.
    """

    def __init__(self, run: Path, step: int):
        path = run / "metrics.jsonl"
        kept = "".join(json.dumps(r) + "\n" for r in read(run) if r["step"] <= step)
        temporary = run / "metrics.jsonl.tmp"
        temporary.write_text(kept, encoding="utf-8")
        os.replace(temporary, path)
        self._file = path.open("a", encoding="utf-8")
        # Not a SummaryWriter: on a full disk its thread dies with a traceback, and what
        # hands events to it waits for ever.
        folder = run / "tensorboard"
        folder.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}"
        self._events = RecordWriter(str(folder / name))
        self._add_event(file_version="brain.Event:2")
        # TensorBoard hides what an interrupted run wrote past it.
        self._add_event(step=step + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, **metrics: float) -> None:
        """Writes the metrics of a step."""
        try:
            self._file.write(json.dumps({"step": step} | metrics) + "\n")
            self._file.flush()
            for name, value in metrics.items():
                self._add_event(step=step, summary=scalar(name, value))
            self._events.flush()
        except OSError as error:
            error.filename = error.filename or self._file.name
            raise

    def _add_event(self, **fields: Any) -> None:
        event = Event(wall_time=time.time(), **fields)
        self._events.write(event.SerializeToString())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for file in self._file, self._events:
            with contextlib.suppress(OSError):  # A full disk was told when writing.
                file.close()


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


@dataclasses.dataclass(frozen=True)
class Result:
    """The outcome of a run, also written to summary.json.

    Attributes:
        optimizer: Its name.
        steps: Updates made.
        tokens: Tokens trained on.
        seconds: Time since this process began to train, evaluations included.
        loss: Mean training loss of the last steps logged, None if no log is left.
        validation: Metrics on all held-out records.
        references: Losses to compare with.
        parameters: Their number.
        optimizer_bytes: Bytes of optimizer state.
        adamw_bytes: What AdamW would take for the same parameters.
    """

    optimizer: str
    steps: int
    tokens: int
    seconds: float
    loss: float | None
    validation: Mapping[str, float]
    references: Mapping[str, float]
    parameters: int
    optimizer_bytes: int
    adamw_bytes: int

    def __str__(self) -> str:
        """Returns a table."""
        rows = {} if self.loss is None else {"training loss": f"{self.loss:.3f}"}
        rows |= {f"validation {k}": f"{v:.3f}" for k, v in self.validation.items()}
        rows |= {f"  {name}": f"{loss:.3f}" for name, loss in self.references.items()}
        minutes, seconds = divmod(round(self.seconds), 60)
        rows |= {
            "tokens": f"{self.tokens:,} in {self.steps:,} steps",
            "time": f"{minutes} min {seconds:02d} s",
            "parameters": f"{self.parameters:,}",
            f"{self.optimizer} state": self._memory(self.optimizer_bytes),
            "  adamw state": self._memory(self.adamw_bytes),
        }
        width = max(map(len, rows))
        return "\n".join(f"{name:<{width}}  {text}" for name, text in rows.items())

    def _memory(self, size: int) -> str:
        return f"{size:,} bytes, {size / self.parameters:.2f} per parameter"


def plot_curve(
    path: Path,
    title: str,
    rows: Sequence[Mapping[str, Any]],
    references: Mapping[str, float],
    metadata: dict[str, Any] | None = None,
) -> None:
    """Draws training and validation loss against steps, and reference losses.

    Lines differ in style, marker and label: the plot reads without colour too.
    `metadata` is the file's.
    """
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, label, style in (
        ("loss", "training", {"linewidth": 1, "color": "0.6"}),
        ("validation_loss", "validation", {"marker": "o", "color": "C0"}),
    ):
        points = [(row["step"], row[name]) for row in rows if name in row]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **style)
    for (name, loss), dashes in zip(
        references.items(), ("--", ":", "-."), strict=False
    ):
        axes.axhline(loss, linestyle=dashes, color="black", linewidth=1)
        axes.annotate(
            f"{name} {loss:.2f}",
            (1, loss),
            xycoords=("axes fraction", "data"),
            xytext=(-4, 3),
            textcoords="offset points",
            horizontalalignment="right",
        )
    axes.set_xlabel("step")
    axes.set_ylabel("cross-entropy (nats)")
    axes.set_title(title)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    figure.savefig(path, dpi=150, metadata=metadata)
    plt.close(figure)

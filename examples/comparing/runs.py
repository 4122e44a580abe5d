"""Logs of runs: one small JSON-lines file each, there as a whole or not at all."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pretraining.files import write_atomically

# A rise of the mean loss of ten steps that counts as a spike, in nats.
SPIKE = 0.2


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        about: The log's first line: method, learning rate, seed and settings.
        rows: The lines after it: "step" with the mean training "loss" of the steps
            since the last row, "validation_..." metrics, or how the run ended.
    """

    about: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]

    @property
    def learning_rate(self) -> float:
        return self.about["learning_rate"]

    @property
    def seed(self) -> int:
        return self.about["seed"]

    @property
    def largest_update(self) -> float:
        """The largest RMS of a leaf's update in any step, over the learning rate."""
        return self.rows[-1]["largest_update"]

    def curve(self, name: str) -> list[tuple[int, float]]:
        """Returns (step, value) of a metric."""
        return [(row["step"], row[name]) for row in self.rows if name in row]

    def final(self, name: str = "validation_loss") -> float:
        """Returns a metric's last value; infinite (or 0, if not a loss) if diverged."""
        if "diverged" in self.rows[-1]:
            return math.inf if name.endswith("loss") else 0.0
        return self.curve(name)[-1][1]

    def spikes(self) -> int:
        """Counts how often the training loss rose by more than SPIKE above its best."""
        count, lowest, risen = 0, math.inf, False
        for _, loss in self.curve("loss"):
            if not risen and loss > lowest + SPIKE:
                count, risen = count + 1, True
            elif loss <= lowest + SPIKE / 2:
                risen = False
            lowest = min(lowest, loss)
        return count


def path(folder: Path, method: str, learning_rate: float, seed: int) -> Path:
    """Returns where a run's log is or will be."""
    return folder / "runs" / method / f"lr-{learning_rate:.2e}-seed-{seed}.jsonl"


def write(path: Path, run: Run) -> None:
    """Writes a run's log."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row) for row in (run.about, *run.rows)]
    write_atomically(path, "\n".join(lines) + "\n")


def read(path: Path) -> Run:
    """Reads a run's log."""
    about, *rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return Run(about, rows)


def read_all(folder: Path, method: str) -> list[Run]:
    """Reads all runs of a method."""
    return [read(path) for path in sorted((folder / "runs" / method).glob("*.jsonl"))]

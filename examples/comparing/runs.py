"""Logs of runs: a study is one file of JSON lines, a line a finished run.

A line is there as a whole or not at all: it is appended by one write, and what follows
the last line's end, where a machine stopped in the middle, counts for nothing.
"""

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# A rise of the mean loss of ten steps that counts as a spike, in nats.
SPIKE = 0.2


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        about: Method, learning rate, seed and settings.
        rows: "step" with the mean training "loss" of the steps since the last row,
            "validation_..." metrics, or how the run ended.
    """

    about: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]

    @property
    def method(self) -> str:
        return self.about["method"]

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


class Log:
    """A study's finished runs, and what each method costs: `runs.jsonl` in its folder.

    Several processes may add to it, each its own methods.
    """

    def __init__(self, folder: Path):
        self.path = folder / "runs.jsonl"
        self._runs: dict[tuple[str, float, int], Run] = {}
        self._costs: dict[str, Mapping[str, float]] = {}
        for line in self._whole().splitlines():
            row = json.loads(line)
            if "cost" in row:
                self._costs[row["method"]] = row["cost"]
            else:
                rows = row.pop("rows")
                self._remember(Run(row, rows))

    def find(self, method: str, learning_rate: float, seed: int) -> Run | None:
        """Returns a run, None if it is not done yet."""
        return self._runs.get((method, learning_rate, seed))

    def runs(self, method: str) -> list[Run]:
        """Returns the runs of a method by learning rate and seed."""
        runs = [run for run in self._runs.values() if run.method == method]
        return sorted(runs, key=lambda run: (run.learning_rate, run.seed))

    def cost(self, method: str) -> Mapping[str, float] | None:
        """Returns what a method costs, None if that was not measured yet."""
        return self._costs.get(method)

    def add(self, run: Run) -> None:
        """Adds a finished run."""
        self._append({**run.about, "rows": run.rows})
        self._remember(run)

    def add_cost(self, method: str, cost: Mapping[str, float]) -> None:
        """Adds what a method costs, whose runs are then all done."""
        self._append({"method": method, "cost": cost})
        self._costs[method] = cost

    def _remember(self, run: Run) -> None:
        self._runs[run.method, run.learning_rate, run.seed] = run

    def _whole(self) -> str:
        if not self.path.exists():
            return ""
        text = self.path.read_text(encoding="utf-8")
        return text[: text.rfind("\n") + 1]

    def _append(self, row: Mapping[str, Any]) -> None:
        whole = len(self._whole().encode())
        if self.path.exists() and self.path.stat().st_size > whole:
            os.truncate(self.path, whole)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab", buffering=0) as file:
            file.write(json.dumps(row).encode() + b"\n")

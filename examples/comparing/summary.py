"""What a method achieved, from the logs of its runs."""

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from comparing import search
from comparing.methods import METHODS
from comparing.runs import Log, Run


@dataclasses.dataclass(frozen=True)
class Summary:
    """One method's results.

    Attributes:
        name: The method's.
        label: For tables and plots.
        runs: At the best learning rate, one a seed.
        losses: Final losses of seed 0 by learning rate.
        good_range: Learning rates between which that is within 1 % of the best.
        cost: Parameters, and bytes of state for each.
    """

    name: str
    label: str
    runs: Sequence[Run]
    losses: Mapping[float, float]
    good_range: tuple[float, float]
    cost: Mapping[str, float]

    @property
    def learning_rate(self) -> float:
        return self.runs[0].learning_rate

    @property
    def width(self) -> float:
        """How many times the lowest good learning rate the highest one is."""
        return self.good_range[1] / self.good_range[0]

    @property
    def metrics(self) -> list[str]:
        """The names of what was measured on held-out text, the loss first."""
        names = {name for row in self.runs[0].rows for name in row}
        names = {name for name in names if name.startswith("validation_")}
        return sorted(names, key=lambda name: (name != "validation_loss", name))

    def finals(self, metric: str = "validation_loss") -> np.ndarray:
        """Returns the last value of a metric for each seed."""
        return np.asarray([run.final(metric) for run in self.runs])

    def mean_curve(self, metric: str = "validation_loss") -> np.ndarray:
        """Returns (step, mean over seeds) in rows."""
        return np.mean([run.curve(metric) for run in self.runs], axis=0)

    def steps_to(self, loss: float) -> float:
        """Returns the part of all steps that it takes to reach a loss, NaN if never.

        The mean curve is interpolated linearly.
        """
        steps, losses = self.mean_curve().T
        reached = np.flatnonzero(losses <= loss)
        if not reached.size:
            return math.nan
        k = reached[0]
        if k == 0:
            return steps[0] / steps[-1]
        part = (losses[k - 1] - loss) / (losses[k - 1] - losses[k])
        return (steps[k - 1] + part * (steps[k] - steps[k - 1])) / steps[-1]

    def minus(self, other: "Summary") -> tuple[float, float]:
        """Returns the mean difference of final losses and its standard error.

        Pairs are of the seeds that both have; of one pair the error is NaN.
        """
        differences = paired_differences(self.runs, other.runs)
        return float(np.mean(differences)), standard_error(differences)


def summarize(log: Log, name: str) -> Summary | None:
    """Returns a method's results, None unless all its runs are done."""
    cost = log.cost(name)
    if cost is None:
        return None
    logs = collections.defaultdict(list)
    for run in log.runs(name):
        logs[search.index_of(run.learning_rate)].append(run)
    sweep = {index: logs[index][0].final() for index in sorted(logs)}
    best = search.best_mean({k: [run.final() for run in logs[k]] for k in logs})
    return Summary(
        name,
        METHODS[name].label,
        logs[best],
        {search.learning_rate(index): loss for index, loss in sweep.items()},
        search.good_range(sweep),
        cost,
    )


def paired_differences(runs: Sequence[Run], others: Sequence[Run]) -> list[float]:
    """Returns the differences of final losses, one for each seed that both have."""
    theirs = {run.seed: run.final() for run in others}
    return [r.final() - theirs[r.seed] for r in runs if r.seed in theirs]


def standard_error(values: Sequence[float]) -> float:
    """Returns the standard error of the mean, NaN if there is only one value."""
    return spread(values) / len(values) ** 0.5


def spread(values: Sequence[float] | np.ndarray) -> float:
    """Returns the standard deviation over seeds, NaN if there is only one."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def best_of(summaries: Sequence[Summary], optimizer: str) -> Summary | None:
    """Returns the best method that uses an optimizer, e.g. of two AdamWs."""
    methods = [s for s in summaries if METHODS[s.name].options.optimizer == optimizer]
    return min(methods, key=lambda s: s.finals().mean(), default=None)

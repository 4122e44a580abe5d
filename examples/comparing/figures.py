"""The results as plots that read without colour: markers, line styles and labels."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from comparing.methods import METHODS
from comparing.summary import Summary

# In all figures: an optimizer's methods share a colour.
COLORS = {
    "came": "#d55e00",
    "published-came": "#882255",
    "adamw": "#0072b2",
    "nadamw": "#56b4e9",
    "adafactor": "#009e73",
    "lion": "#777777",
    "muon": "#cc79a7",
}
MOST_LINES = 6
_MARKERS = "osD^v<"
_LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)))


def draw(path: Path, title: str, summaries: Sequence[Summary]) -> None:
    """Draws loss against steps, learning rate and optimizer state, of few methods."""
    summaries = choose(summaries)
    figure, grid = plt.subplots(
        2, 2, figsize=(9, 8.5), layout="constrained", sharey=True
    )
    *axes, legend = grid.flat
    means = [summary.finals().mean() for summary in summaries]
    # The last may have learnt next to nothing.
    means = means[:-1] if len(means) == MOST_LINES else means
    lowest = min(min(*s.finals(), *s.losses.values()) for s in summaries)
    range_ = max(max(means) - min(means), 0.01 * min(means))
    axes[0].set_ylim(lowest - 0.1 * range_, min(means) + 2 * range_)
    for index, summary in enumerate(summaries):
        style = {
            "color": COLORS[METHODS[summary.name].options.optimizer],
            "marker": _MARKERS[index],
            "linestyle": _LINES[index],
            "label": summary.label,
            "markersize": 5,
            "linewidth": 1.2,
        }
        axes[0].plot(*summary.mean_curve().T, **style)
        _plot_learning_rates(axes[1], summary, style)
        finals = summary.finals()
        axes[2].errorbar(
            summary.cost["state_bytes_per_parameter"],
            finals.mean(),
            yerr=finals.std(ddof=1) if len(finals) > 1 else None,
            capsize=3,
            **style | {"linestyle": "none", "markersize": 8},
        )
    axes[0].set(xlabel="step", ylabel="validation loss (nats per token)")
    axes[2].set(ylabel="validation loss (nats per token)")
    axes[0].set_title("at the best learning rate, mean of the seeds", fontsize=10)
    axes[1].set(xlabel="peak learning rate", xscale="log")
    axes[1].set_title(
        "after all steps, one seed; ring: best mean of the seeds", fontsize=10
    )
    axes[2].set(xlabel="optimizer state (bytes per parameter)", xlim=(-0.5, 9))
    axes[2].set_title("after all steps, mean and spread of the seeds", fontsize=10)
    figure.suptitle(title)
    legend.axis("off")
    handles, labels = axes[0].get_legend_handles_labels()
    legend.legend(handles, labels, loc="center", handlelength=4, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def choose(summaries: Sequence[Summary]) -> list[Summary]:
    """Returns at most MOST_LINES: the best of each optimizer, then the best others."""
    known: set[str] = set()
    first: list[Summary] = []
    others: list[Summary] = []
    for summary in sorted(summaries, key=lambda s: s.finals().mean()):
        optimizer = METHODS[summary.name].options.optimizer
        (others if optimizer in known else first).append(summary)
        known.add(optimizer)
    chosen = (first + others)[:MOST_LINES]
    return sorted(chosen, key=lambda s: s.finals().mean())


def _plot_learning_rates(axes: Any, summary: Summary, style: dict[str, Any]) -> None:
    rates = np.asarray(list(summary.losses))
    losses = np.asarray(
        [loss if math.isfinite(loss) else math.nan for loss in summary.losses.values()]
    )
    axes.plot(rates, losses, **style)
    best = summary.learning_rate
    axes.plot(
        best,
        summary.losses[best],
        marker="o",
        markersize=13,
        markerfacecolor="none",
        color=style["color"],
    )

"""Draws docs/figures/memory_and_loss.svg: the loss against the optimizer's state.

To draw it anew:

    python docs/figures/memory_and_loss.py
"""

import pathlib
import statistics
import sys

import matplotlib
import matplotlib.pyplot as plt
from drawing import COLORS, STYLE

HERE = pathlib.Path(__file__).parent
sys.path.append(str(HERE.parent / "results"))
import tables  # noqa: E402

# Where its label stands beside a point, in points.
LABELS = {
    "`came_muon`, int8 momentum": ("came_muon, int8", (8, -10), "left"),
    "`came_muon`, int4 momentum": ("came_muon, int4", (-8, 4), "right"),
    "Muon": ("Muon", (8, -4), "left"),
    "NorMuon, as in its paper": ("NorMuon", (8, 8), "left"),
    "`steady_came`": ("steady_came", (4, -16), "left"),
    "`steady_came`, int8 momentum": ("steady_came, int8", (-4, -12), "right"),
    "NAdamW": ("NAdamW", (8, 2), "left"),
    "AdamW": ("AdamW", (8, 3), "left"),
    "AdamW in 8 bits": ("AdamW in 8 bits", (-8, 2), "right"),
    "Adafactor, no momentum": ("Adafactor", (8, 4), "left"),
    "`came`, as published": ("came, as published", (-6, 12), "center"),
}


def main():
    judged = tables.judged(tables.JUDGED["GPT-2"])
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for name, (label, offset, side) in LABELS.items():
        runs = list(judged[tables.IN_README[name]].values())
        losses = [run["loss"] for run in runs]
        ours = label.startswith(("came_muon", "steady_came"))
        color = COLORS["steady_came"] if ours else "0.35"
        point = runs[0]["state_bytes_per_parameter"], statistics.mean(losses)
        axes.errorbar(*point, statistics.stdev(losses), fmt="o", color=color)
        axes.annotate(
            label,
            point,
            offset,
            textcoords="offset points",
            ha=side,
            va="center",
            color=color,
            weight="bold" if ours else "normal",
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks([0.125, 0.25, 0.5, 1, 2, 4, 8])
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlim(0.085, 20)
    axes.set_ylim(bottom=3.05)
    axes.set_xlabel("state, bytes a parameter")
    axes.set_ylabel("validation loss of a small GPT-2")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(HERE / "memory_and_loss.svg", metadata={"Date": None})


if __name__ == "__main__":
    with matplotlib.rc_context(STYLE | {"font.size": 13}):
        main()

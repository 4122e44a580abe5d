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
    "`steady_came`": ("steady_came", (8, -6), "left"),
    "the same, int8 momentum": ("steady_came, int8", (-4, -20), "left"),
    "the same, int4 momentum": ("steady_came, int4", (-8, 8), "right"),
    "Muon and `steady_came`, int8": ("Muon and\nsteady_came, int8", (-8, 0), "right"),
    "Muon": ("Muon", (8, 0), "left"),
    "NAdamW": ("NAdamW", (8, -3), "left"),
    "AdamW": ("AdamW", (8, 3), "left"),
    "AdamW in 8 bits": ("AdamW in 8 bits", (-8, 2), "right"),
    "Adafactor, momentum 0.9": ("Adafactor,\nmomentum", (-8, 6), "right"),
    "Adafactor, no momentum": ("Adafactor", (8, 4), "left"),
    "`came`, as published": ("came, as published", (-8, -4), "right"),
}


def main():
    runs, taken = tables.read("gpt2")
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for name, (label, offset, side) in LABELS.items():
        method, _, by_seed = tables.best(runs, tables.OPTIMIZERS[name])
        losses = list(tables.losses(by_seed).values())
        ours = "steady_came" in label
        color = COLORS["steady_came"] if ours else "0.35"
        point = taken[method], statistics.mean(losses)
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
    axes.set_ylim(bottom=3.56)
    axes.set_xlabel("state, bytes a parameter")
    axes.set_ylabel("validation loss of a small GPT-2")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(HERE / "memory_and_loss.svg", metadata={"Date": None})


if __name__ == "__main__":
    with matplotlib.rc_context(STYLE | {"font.size": 13}):
        main()

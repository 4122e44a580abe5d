"""Draws docs/figures/benchmarks.svg: what an update moves, and how long it takes.

From what the benchmarks wrote into docs/results/benchmarks:

    python docs/figures/benchmarks.py
"""

import json
import pathlib

import matplotlib
import matplotlib.pyplot as plt
from drawing import COLORS, STYLE
from matplotlib.lines import Line2D

RESULTS = pathlib.Path(__file__).parents[1] / "results" / "benchmarks"
CHIPS = {"v5e": "o", "v5p": "s", "v6e": "^", "h100": "D"}
OF_OPTIMIZER = {
    "steady_came": COLORS["steady_came"],
    "came": COLORS["came"],
    "AdamW": COLORS["AdamW"],
    "Adafactor": COLORS["Adafactor"],
    "SGD": "#777777",
}
MODELS = {"gpt2": ("GPT-2 small", "o"), "bert": ("BERT base", "s")}


def read(name, column):
    """Returns a column of a benchmark's table by optimizer."""
    path = RESULTS / f"{name}.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return {next(iter(row.values())): float(row[column]) for row in rows}


def draw(axes, marker, values):
    for name, value in values.items():
        color = OF_OPTIMIZER[name.partition(",")[0]]
        axes.plot([value], [name], marker, color=color, fillstyle="none", markersize=8)


def explain(axes, markers):
    handles = [
        Line2D([], [], marker=marker, color="0", linestyle="", fillstyle="none")
        for marker in markers.values()
    ]
    axes.legend(handles, markers.keys(), loc="lower left")


def main():
    figure, (traffic, time) = plt.subplots(
        1, 2, figsize=(9, 4), layout="constrained", sharey=True
    )
    for chip, marker in CHIPS.items():
        draw(traffic, marker, read(f"compiled_traffic_{chip}", "bytes/parameter"))
    explain(traffic, CHIPS)
    traffic.invert_yaxis()
    traffic.set(xlim=(0, None), xlabel="memory traffic (bytes per parameter)")
    for model, (_, marker) in MODELS.items():
        values = read(f"update_{model}", "to AdamW")
        draw(
            time,
            marker,
            {k: v for k, v in values.items() if not k.startswith("PyTorch")},
        )
    explain(time, dict(MODELS.values()))
    time.set(xlim=(0, None), xlabel="time on a CPU (× AdamW's)")
    for axes in (traffic, time):
        axes.grid(axis="x", alpha=0.3)
    path = pathlib.Path(__file__).with_suffix(".svg")
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    with matplotlib.rc_context(STYLE):
        main()

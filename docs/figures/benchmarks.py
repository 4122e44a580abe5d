"""Draws docs/figures/benchmarks.svg: what an update moves, and how long it takes.

From what the benchmarks wrote into docs/results/benchmarks:

    python docs/figures/benchmarks.py
"""

import json
import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from dynamics import STYLE

RESULTS = pathlib.Path(__file__).parents[1] / "results" / "benchmarks"
CHIPS = {"v5e": "o", "v5p": "s", "v6e": "^", "h100": "D"}
MODELS = {"gpt2": ("GPT-2 small", "o"), "bert": ("BERT base", "s")}


def read(name, column):
    """Returns a column of a benchmark's table by optimizer."""
    path = RESULTS / f"{name}.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return {next(iter(row.values())): float(row[column]) for row in rows}


def draw(axes, label, marker, values):
    axes.plot(values.values(), values.keys(), marker, label=label, fillstyle="none")


def main():
    figure, (traffic, time) = plt.subplots(
        1, 2, figsize=(9, 4), layout="constrained", sharey=True
    )
    for chip, marker in CHIPS.items():
        draw(traffic, chip, marker, read(f"compiled_traffic_{chip}", "bytes/parameter"))
    traffic.invert_yaxis()
    traffic.set(xlim=(0, None), xlabel="memory traffic (bytes per parameter)")
    for model, (label, marker) in MODELS.items():
        values = read(f"update_{model}", "to AdamW")
        draw(
            time,
            label,
            marker,
            {k: v for k, v in values.items() if not k.startswith("PyTorch")},
        )
    time.set(xlim=(0, None), xlabel="time on a CPU (× AdamW's)")
    for axes in (traffic, time):
        axes.grid(axis="x", alpha=0.3)
        axes.legend(loc="lower left")
    path = pathlib.Path(__file__).with_suffix(".svg")
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    with matplotlib.rc_context(STYLE):
        main()

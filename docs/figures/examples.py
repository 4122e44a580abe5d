"""Draws the pretraining examples' curves into docs/figures: losses against steps.

From what their runs left, metrics.jsonl and summary.json, kept in docs/results/examples
under the names of the scripts:

    python docs/figures/examples.py
"""

import json
import pathlib

import matplotlib
import matplotlib.pyplot as plt
from drawing import COLORS, STYLE

HERE = pathlib.Path(__file__).parent
RESULTS = HERE.parent / "results" / "examples"


def read(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def draw(axes, rows, name, **style):
    points = [(row["step"], row[name]) for row in rows if name in row]
    axes.plot(*zip(*points, strict=True), **style)


def pretraining(axes, metrics):
    rows = read(metrics)
    draw(axes, rows, "loss", color="0.6", label="training")
    draw(
        axes,
        rows,
        "validation_loss",
        color=COLORS["steady_came"],
        marker=".",
        label="validation",
    )
    summary = json.loads(metrics.with_suffix(".json").read_text(encoding="utf-8"))
    for (name, loss), dashes in zip(
        summary["references"].items(), ("--", ":"), strict=False
    ):
        axes.axhline(loss, color="0.3", linestyle=dashes, label=name)
    axes.set_ylabel("loss (nats per token)")


def main():
    for log in sorted(RESULTS.glob("pretrain_*.jsonl")):
        figure, axes = plt.subplots(figsize=(6.5, 3.6), layout="constrained")
        pretraining(axes, log)
        axes.set_xlabel("step")
        axes.grid(alpha=0.2)
        axes.legend(frameon=False)
        figure.savefig(HERE / f"{log.stem}.svg", metadata={"Date": None})


if __name__ == "__main__":
    with matplotlib.rc_context(STYLE):
        main()

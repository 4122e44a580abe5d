"""Draws the examples' curves into docs/figures: losses against steps.

From the folders of the runs, whose metrics.jsonl and summary.json are kept in
docs/results/examples, and from the logs in docs/results/fine-tuning:

    python docs/figures/examples.py
"""

import json
import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from dynamics import STYLE

HERE = pathlib.Path(__file__).parent
RESULTS = HERE.parent / "results"
BLUE, ORANGE = "#0072b2", "#d55e00"
FINE_TUNING = {
    "came-bc-b2-0.95-eps2-0.1-clip-1": ("steady_came, no Nesterov momentum", ORANGE),
    "adamw": ("AdamW", BLUE),
}


def read(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def draw(axes, rows, name, **style):
    points = [(row["step"], row[name]) for row in rows if name in row]
    axes.plot(*zip(*points, strict=True), **style)


def pretraining(axes, metrics):
    rows = read(metrics)
    draw(axes, rows, "loss", color="0.6", label="training")
    draw(axes, rows, "validation_loss", color=ORANGE, marker=".", label="validation")
    summary = json.loads(metrics.with_suffix(".json").read_text(encoding="utf-8"))
    for (name, loss), dashes in zip(
        summary["references"].items(), ("--", ":"), strict=False
    ):
        axes.axhline(loss, color="0.3", linestyle=dashes, label=name)
    axes.set_ylabel("loss (nats per token)")


def fine_tuning(axes, log):
    for run in read(log):
        if run["method"] in FINE_TUNING:
            label, color = FINE_TUNING[run["method"]]
            label = label if run["seed"] == 0 else None
            draw(axes, run["rows"], "validation_loss", color=color, label=label)
    axes.set_ylabel("validation loss (nats per sentence)")


def main():
    logs = sorted((RESULTS / "examples").glob("*.jsonl"))
    panels = {path.stem: (pretraining, path) for path in logs}
    panels["finetune_classifier"] = (
        fine_tuning,
        RESULTS / "fine-tuning" / "runs.jsonl",
    )
    for name, (fill, log) in panels.items():
        figure, axes = plt.subplots(figsize=(6.5, 3.6), layout="constrained")
        fill(axes, log)
        axes.set_xlabel("step")
        axes.grid(alpha=0.2)
        axes.legend(frameon=False)
        figure.savefig(HERE / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    with matplotlib.rc_context(STYLE):
        main()

"""Draws docs/figures/loss_against_memory.svg: what each byte of state buys.

And writes the same losses into docs/results/losses.md, which README.md shows too. From
the logs of `examples/compare_optimizers.py` in docs/results:

    python docs/figures/loss_against_memory.py
"""

import pathlib
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from dynamics import STYLE

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples"))
from comparing.runs import Log  # noqa: E402
from comparing.summary import spread, summarize  # noqa: E402

TASKS = {"gpt2": "GPT-2", "bert": "BERT", "t5": "T5"}
BLUE, ORANGE = "#0072b2", "#d55e00"
# Label, marker, colour and how much of the marker is filled. Where AdamW and NAdamW
# come with two β2, the better one on the task.
METHODS = {
    ("steady-came",): ("steady_came", "o", ORANGE, "full"),
    ("steady-came-int8",): ("the same, int8 momentum", "o", ORANGE, "left"),
    ("steady-came-int4",): ("the same, int4 momentum", "o", ORANGE, "none"),
    ("adamw", "adamw-b2-0.999"): ("AdamW", "s", BLUE, "full"),
    ("nadamw", "nadamw-b2-0.999"): ("NAdamW", "s", BLUE, "none"),
    ("flash-adamw",): ("AdamW in 8 bits", "s", BLUE, "left"),
    ("adafactor",): ("Adafactor, momentum 0.9", "^", BLUE, "full"),
    ("adafactor-b1-0",): ("Adafactor, no momentum", "^", BLUE, "none"),
    ("muon",): ("Muon", "D", BLUE, "full"),
    ("came",): ("CAME, as published", "X", ORANGE, "full"),
}
LOSSES = ROOT / "docs" / "results" / "losses.md"


def read(task):
    """Returns the summary of the best of each row's methods on a task, by label."""
    log = Log(ROOT / "docs" / "results" / f"{task}-nano")
    found = {}
    for names, (label, *_) in METHODS.items():
        known = [s for s in (summarize(log, name) for name in names) if s]
        if known:
            found[label] = min(known, key=lambda summary: summary.finals().mean())
    return found


def table(results):
    """Returns mean ± standard deviation over seeds, a row an optimizer."""
    lines = [["optimizer", *TASKS.values()], ["---", *["---:"] * len(TASKS)]]
    for label, *_ in METHODS.values():
        row = [label]
        for found in results.values():
            finals = found[label].finals() if label in found else []
            row.append(
                f"{finals.mean():.3f} ± {spread(finals):.3f} ({len(finals)})"
                if len(finals) > 1
                else ""
            )
        if any(row[1:]):
            lines.append(row)
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main():
    results = {task: read(task) for task in TASKS}
    LOSSES.write_text(table(results), encoding="utf-8")
    figure, panels = plt.subplots(1, 3, figsize=(10, 4.2), layout="constrained")
    handles = {}
    for axes, (task, title) in zip(panels, TASKS.items(), strict=True):
        for label, marker, color, fill in METHODS.values():
            if label not in results[task]:
                continue
            best = results[task][label]
            finals = best.finals()
            handles[label] = axes.errorbar(
                best.cost["state_bytes_per_parameter"],
                finals.mean(),
                spread(finals),
                fmt=marker,
                color=color,
                fillstyle=fill,
                markersize=8,
                capsize=4,
            )
        axes.set(title=title, xlim=(-0.4, 9))
        axes.margins(y=0.1)
        axes.grid(alpha=0.2)
    panels[0].set_ylabel("validation loss (nats per token)")
    panels[1].set_xlabel("optimizer state (bytes per parameter)")
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=3,
        frameon=False,
    )
    path = pathlib.Path(__file__).with_suffix(".svg")
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    with matplotlib.rc_context(STYLE):
        main()

"""Draws docs/figures/loss_against_memory.svg: what each byte of state buys.

And writes the same losses into docs/results/losses.md and README.md, and those at two
sizes of a model into docs/results/sizes.md. From the logs of
`examples/compare_optimizers.py` in docs/results:

    python docs/figures/loss_against_memory.py
"""

import pathlib

import matplotlib
import matplotlib.pyplot as plt
from drawing import COLORS, STYLE, Log, format_table, spread, summarize

ROOT = pathlib.Path(__file__).parents[2]

RESULTS = ROOT / "docs" / "results"
TASKS = {"gpt2": "GPT-2", "bert": "BERT", "t5": "T5"}
SIZES = {
    "GPT-2": ("gpt2-nano", "gpt2-tiny-comparison"),
    "BERT": ("bert-nano", "bert-tiny-comparison"),
}
# Label, marker, whose colour and how much of the marker is filled. Where AdamW and
# NAdamW come with two β2, the better one on the task.
METHODS = {
    ("steady-came",): ("steady_came", "o", "came", "full"),
    ("steady-came-int8",): ("the same, int8 momentum", "o", "came", "left"),
    ("steady-came-int4",): ("the same, int4 momentum", "o", "came", "none"),
    ("adamw", "adamw-b2-0.999"): ("AdamW", "s", "adamw", "full"),
    ("nadamw", "nadamw-b2-0.999"): ("NAdamW", "s", "nadamw", "none"),
    ("flash-adamw",): ("AdamW in 8 bits", "s", "adamw", "left"),
    ("adafactor",): ("Adafactor, momentum 0.9", "^", "adafactor", "full"),
    ("adafactor-b1-0",): ("Adafactor, no momentum", "^", "adafactor", "none"),
    ("muon",): ("Muon", "D", "muon", "full"),
    ("muon-int8",): ("Muon and steady_came, int8", "D", "muon", "left"),
    ("came",): ("CAME, as published", "X", "published-came", "full"),
}
README = ROOT / "README.md"
BEGIN = "<!-- losses, by docs/figures/loss_against_memory.py -->\n"
END = "<!-- end -->\n"


def read(study):
    """Returns the summary of the best of each row's methods in a study, by label."""
    log = Log(RESULTS / study)
    found = {}
    for names, (label, *_) in METHODS.items():
        known = [s for s in (summarize(log, name) for name in names) if s]
        if known:
            found[label] = min(known, key=lambda summary: summary.finals().mean())
    return found


def table(results):
    """Returns bytes, and mean loss ± standard deviation over seeds, by optimizer."""
    rows = [["optimizer", "bytes / parameter", *TASKS.values()]]
    for label, *_ in METHODS.values():
        known = [found[label] for found in results.values() if label in found]
        if not known:
            continue
        sizes = [summary.cost["state_bytes_per_parameter"] for summary in known]
        low, high = f"{min(sizes):.1f}", f"{max(sizes):.1f}"
        row = [label, low if low == high else f"{low} to {high}"]
        for found in results.values():
            finals = found[label].finals() if label in found else []
            row.append(
                f"{finals.mean():.3f} ± {spread(finals):.3f} ({len(finals)})"
                if len(finals) > 1
                else ""
            )
        if any(row[2:]):
            rows.append(row)
    return format_table(rows, "<" + ">" * (len(rows[0]) - 1), markdown=True) + "\n"


def table_of_sizes():
    """Returns losses, and ranks among those that both sizes have, by optimizer."""
    columns = {}
    for task, studies in SIZES.items():
        small, large = map(read, studies)
        both = [label for label in small if label in large]
        for found in small, large:
            parameters = found[both[0]].cost["parameters"]
            means = {label: found[label].finals().mean() for label in both}
            ranks = {label: k for k, label in enumerate(sorted(both, key=means.get), 1)}
            columns[f"{task}, {parameters:,} parameters"] = {
                label: f"{ranks[label]}. {means[label]:.3f}" for label in both
            }
    rows = [["optimizer", *columns]]
    for label, *_ in METHODS.values():
        row = [column.get(label, "") for column in columns.values()]
        if any(row):
            rows.append([label, *row])
    return format_table(rows, "<" + ">" * len(columns), markdown=True) + "\n"


def main():
    results = {task: read(f"{task}-nano") for task in TASKS}
    losses = table(results)
    (RESULTS / "losses.md").write_text(losses, encoding="utf-8")
    (RESULTS / "sizes.md").write_text(table_of_sizes(), encoding="utf-8")
    readme = README.read_text(encoding="utf-8")
    head, rest = readme.split(BEGIN)
    README.write_text(f"{head}{BEGIN}{losses}{END}{rest.split(END, 1)[1]}", "utf-8")
    figure, panels = plt.subplots(1, 3, figsize=(10, 4.2), layout="constrained")
    handles = {}
    for axes, (task, title) in zip(panels, TASKS.items(), strict=True):
        for label, marker, optimizer, fill in METHODS.values():
            if label not in results[task]:
                continue
            best = results[task][label]
            finals = best.finals()
            handles[label] = axes.errorbar(
                best.cost["state_bytes_per_parameter"],
                finals.mean(),
                spread(finals),
                fmt=marker,
                color=COLORS[optimizer],
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

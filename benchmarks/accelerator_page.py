"""Tables and plots of what `accelerator.py` measured, for docs/accelerator.md.

From files of JSON lines in docs/results/accelerator, one a device:

    python benchmarks/accelerator_page.py
"""

import argparse
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from measuring import ROOT
from measuring.output import table
from on_accelerator import recorder

FOLDER = ROOT / "docs" / "results" / "accelerator"
NOTHING = """\
No accelerator has been timed yet: nothing of what stands on other pages about TPUs and
GPUs was measured on one. It was counted in programs that XLA compiled for them.
"""
GIB = 2**30
Row = Mapping[str, Any]
Rates = Mapping[str, Row]  # What the device can do at best, by case.


def write_page(folder: pathlib.Path) -> None:
    """Writes `tables.md`, and plots beside it, of the files in a folder."""
    sections = [
        section(path, rows)
        for path in sorted(folder.glob("*.jsonl"))
        if (rows := newest(recorder.read(path)))
    ]
    text = "\n\n".join(sections) + "\n" if sections else NOTHING
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tables.md").write_text(text, encoding="utf-8")


def newest(rows: Sequence[Row]) -> list[Row]:
    """Returns the rows at full size, of two of the same case the one that was last.

    That a job was skipped, or ended early, is left out once it was done.
    """
    names = ("job", "case", "model", "optimizer", "mu_dtype", "param_dtype", "layers")
    rows = [row for row in rows if row["size"] == "full"]
    last = {row["job"]: i for i, row in enumerate(rows) if measured(row)}
    cases = {}
    for i, row in enumerate(rows):
        key = tuple(row.get(name) for name in names)
        if any(key[1:]) or measured(row) or i > last.get(row["job"], -1):
            cases[key] = row
    return list(cases.values())


def section(path: pathlib.Path, rows: Sequence[Row]) -> str:
    """Returns all that is known of one device, as Markdown."""
    machine = next(row for row in rows if "device" in row)
    rates = {r["case"]: r for r in rows if r["part"] == "machine" and "case" in r}
    blocks = [f"## {machine['device']}", about(machine, rates)]
    for part, make in PARTS.items():
        of_part = [row for row in rows if row["part"] == part and measured(row)]
        if of_part:
            blocks += make(of_part, path, rates)
    if other := [row for row in rows if not measured(row)]:
        lines = [f"- {row['job']}{case(row)}: {reason(row)}" for row in other]
        blocks += ["### Not measured", "\n".join(lines)]
    return "\n\n".join(blocks)


def measured(row: Row) -> bool:
    return "failed" not in row and "skipped" not in row


def case(row: Row) -> str:
    found = [row[n] for n in ("case", "optimizer", "mu_dtype") if n in row]
    return f" ({', '.join(found)})" if found else ""


def reason(row: Row) -> str:
    return row.get("skipped") or f"**failed**: `{row['failed']}`"


def about(machine: Row, rates: Rates) -> str:
    versions = machine["packages"]
    parts = [f"jax {versions['jax']}", f"optax {versions['optax']}"]
    if versions.get("torch"):
        parts.append(f"PyTorch {versions['torch']}")
    if machine["driver"]:
        parts.append(f"driver {machine['driver']}")
    if machine["memory"]:
        parts.append(f"{machine['memory'] / GIB:.1f} GiB that JAX may allocate")
    if "gb_per_second" in rates.get("copy", {}):
        parts.append(f"a copy moves {rates['copy']['gb_per_second']:,.0f} GB/s")
    if "tflops" in rates.get("matmul", {}):
        rate = f"{rates['matmul']['tflops']:,.0f} TFLOP/s"
        parts.append(f"a bfloat16 product of 8192 × 8192 runs at {rate}")
    return f"{', '.join(parts)}. Commit {machine['commit']}, {machine['time']}."


def values(rows: Sequence[Row], path: pathlib.Path, rates: Rates) -> list[str]:
    columns = {"error": ".1e", "rounded otherwise": ".1e", "error of its own": ".1e"}
    compared = [row for row in rows if "error" in row]
    lines = [
        {
            "computed": f"{row['case']}, {row['mu_dtype']}, "
            f"parameters {row['param_dtype']}"
        }
        | {name: format(row[name], spec) for name, spec in columns.items()}
        | {"verdict": verdict(row)}
        for row in compared
    ]
    blocks = ["### Values", table(lines)] if lines else ["### Values"]
    others = [
        f"- {row['case']}{', ' + row['mu_dtype'] if 'mu_dtype' in row else ''}: "
        + ", ".join(f"{k} {number(row[k])}" for k in OTHER_VALUES if k in row)
        + f": {verdict(row)}"
        for row in rows
        if "error" not in row
    ]
    return [*blocks, "\n".join(others)] if others else blocks


OTHER_VALUES = ("standard errors off", "state", "allocated", "grown")


def verdict(row: Row) -> str:
    return "as it should be" if row["passed"] else "**wrong**"


def number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.2g}"


def update(rows: Sequence[Row], path: pathlib.Path, rates: Rates) -> list[str]:
    blocks = ["### Time of an update"]
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["param_dtype"]), []).append(row)
    for (model, dtype), group in groups.items():
        baseline = {row["optimizer"]: row["ms"] for row in group}.get("AdamW")
        copies = rates.get("copy", {}).get("gb_per_second")
        lines = [
            update_line(f"{model}, {dtype}", row, baseline, copies) for row in group
        ]
        blocks.append(table(lines))
    draw_updates(groups, figure := path.with_name(f"{path.stem}-update.svg"))
    return [*blocks, image(figure, "Time of an update of each optimizer")]


def update_line(
    head: str, row: Row, baseline: float | None, copies: float | None
) -> dict[str, str]:
    rate = row.get("GB/s")
    return {
        head: row["optimizer"],
        "ms": f"{row['ms']:.2f}",
        "to AdamW": f"{row['ms'] / baseline:.2f}" if baseline else "",
        "bytes/parameter": row.get("bytes/parameter") or "",
        "GB/s": f"{rate:,.0f}" if rate else "",
        "of a copy's": f"{rate / copies:.0%}" if rate and copies else "",
        "state (MB)": f"{row['state'] / 1e6:,.0f}",
    }


def draw_updates(
    groups: Mapping[tuple[str, str], Sequence[Row]], path: pathlib.Path
) -> None:
    figure, panels = plt.subplots(
        len(groups),
        1,
        figsize=(8, 1 + 0.25 * sum(map(len, groups.values()))),
        height_ratios=[len(group) + 2 for group in groups.values()],
        squeeze=False,
        layout="constrained",
    )
    for ((model, dtype), group), axes in zip(groups.items(), panels[:, 0], strict=True):
        names = [row["optimizer"] for row in group]
        bars = axes.barh(names, [row["ms"] for row in group], 0.6, color="0.6")
        axes.bar_label(bars, fmt="%.2f", padding=2)
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set(xlabel="ms", title=f"{model}, {dtype} parameters")
    save(figure, path)


def step(rows: Sequence[Row], path: pathlib.Path, rates: Rates) -> list[str]:
    lines = [
        {
            f"batches of {row['batch']} × {row['sequence']}": row["optimizer"],
            "ms": f"{row['ms']:.1f}",
            "tokens/s": f"{row['tokens/s']:,.0f}",
            "of the peak rate": percent(row["utilisation"]),
            "update (ms)": f"{row['update, ms']:.2f}",
            "share of the update": percent(row["share of the update"]),
            "peak (GiB)": gib(row["peak"]),
            "compiler's figure (GiB)": gib(row["compiler's figure"]),
        }
        for row in rows
    ]
    return ["### GPT-2 small's training step", table(lines)]


def largest(rows: Sequence[Row], path: pathlib.Path, rates: Rates) -> list[str]:
    lines = [
        {
            "optimizer": row["optimizer"],
            "parameters in": row["param_dtype"],
            "layers × width": f"{row['layers']} × {row['width']}",
            "parameters (10⁹)": f"{row['parameters'] / 1e9:.2f}",
            "compiler's figure (GiB)": gib(row["compiler's figure"]),
            "memory (GiB)": gib(row["limit"]),
            "peak (GiB)": gib(row.get("peak")),
            "three steps": "ran" if row["ran"] else "out of memory",
        }
        for row in rows
    ]
    return ["### The largest model", table(lines)]


def pretrain(rows: Sequence[Row], path: pathlib.Path, rates: Rates) -> list[str]:
    data = [row for row in rows if row.get("case") == "data"]
    runs = [row for row in rows if "rows" in row]
    blocks = ["### GPT-2 small on real text"]
    if data:
        row = data[-1]
        unigram, bigram = row["references"]["unigram"], row["references"]["bigram"]
        blocks.append(
            f"{row['steps']} steps, {row['tokens']:,} tokens, {row['epochs']:.2f} "
            f"epochs of {', '.join(row['corpora'])}. Counting has a loss of "
            f"{unigram:.2f} (unigram) and {bigram:.2f} (bigram)."
        )
    if runs:
        blocks.append(table([pretrain_line(row) for row in runs]))
        draw_losses(runs, figure := path.with_name(f"{path.stem}-pretrain.svg"))
        blocks.append(image(figure, "Loss against tokens and against seconds"))
    return blocks


def pretrain_line(row: Row) -> dict[str, str]:
    last = row["rows"][-1]
    return {
        "optimizer": row["optimizer"],
        "validation loss": f"{row['validation']:.3f}" if row["validation"] else "",
        "tokens": f"{last['tokens']:,}",
        "seconds": f"{last['seconds']:.0f}",
        "state (MB)": f"{row['state'] / 1e6:,.0f}" if row["state"] else "",
        "resumed at step": ", ".join(map(str, row["resumed_at"])),
        "finished": "yes" if row["finished"] else "no",
    }


def draw_losses(runs: Sequence[Row], path: pathlib.Path) -> None:
    figure, panels = plt.subplots(
        1, 2, figsize=(9, 4), sharey=True, layout="constrained"
    )
    for axes, against in zip(panels, ("tokens", "seconds"), strict=True):
        for row, style in zip(runs, ("-", "--", ":", "-.", (0, (1, 3))), strict=False):
            curve = [(r[against], r["loss"]) for r in row["rows"] if "loss" in r]
            axes.plot(
                *zip(*curve, strict=True), linestyle=style, label=row["optimizer"]
            )
        axes.set_xlabel(against)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("training loss (nats per token)")
    panels[0].legend()
    save(figure, path)


PARTS: dict[str, Callable[[Sequence[Row], pathlib.Path, Rates], list[str]]] = {
    "values": values,
    "update": update,
    "step": step,
    "largest": largest,
    "pretrain": pretrain,
}


def gib(size: float | None) -> str:
    return f"{size / GIB:.2f}" if size else ""


def percent(share: float | None) -> str:
    return f"{share:.1%}" if share else ""


def image(path: pathlib.Path, alt: str) -> str:
    return (
        f"```{{image}} results/accelerator/{path.name}\n:alt: {alt}\n:width: 100%\n```"
    )


def save(figure: Figure, path: pathlib.Path) -> None:
    figure.savefig(path, transparent=True, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=pathlib.Path, default=FOLDER)
    write_page(parser.parse_args().folder)


if __name__ == "__main__":
    main()

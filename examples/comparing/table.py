"""The results as tables in Markdown."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from comparing import search
from comparing.methods import METHODS, REFERENCE
from comparing.runs import Log
from comparing.summary import (
    Summary,
    best_of,
    paired_differences,
    spread,
    standard_error,
)
from pretraining.table import format_table

# In a second table, which keeps the first one as wide as a page.
DETAILS = (
    "learning rates within 1 %",
    "largest update RMS / lr",
    "spikes",
    "learning rates tried",
)
# Of seeds, for a difference to be worth a row.
FEWEST_PAIRS = 3


def make_tables(summaries: Sequence[Summary], known: Sequence[Summary]) -> str:
    """Returns the tables of some methods, best first: results, and details of the runs.

    Args:
        summaries: The rows.
        known: All methods, among which are those to compare with.
    """
    others = {
        name: best_of(known, optimizer)
        for name, optimizer in {"AdamW": "adamw", "Adafactor": "adafactor"}.items()
    }
    reference = {summary.name: summary for summary in known}.get(REFERENCE)
    rows = [
        _row(summary, reference or others["AdamW"], others)
        for summary in sorted(summaries, key=lambda s: s.finals().mean())
    ]
    names = [name for name in rows[0] if name not in DETAILS]
    return f"{_format(rows, names)}\n\n{_format(rows, ['optimizer', *DETAILS])}\n"


def make_same_rate_table(log: Log, names: Sequence[str]) -> str | None:
    """Returns the differences from the reference at its own learning rates, or None.

    Of runs at which a method has no fewer than `FEWEST_PAIRS` seeds in common with it.

    Args:
        log: All runs.
        names: The rows' methods.
    """
    reference = log.runs(REFERENCE)
    rows = []
    for rate in sorted({run.learning_rate for run in reference}):
        here = [run for run in reference if run.learning_rate == rate]
        for name in names:
            runs = [run for run in log.runs(name) if run.learning_rate == rate]
            differences = paired_differences(runs, here)
            if name == REFERENCE or len(differences) < FEWEST_PAIRS:
                continue
            mean, error = float(np.mean(differences)), standard_error(differences)
            row = [METHODS[name].label, f"{rate:.1e}", str(len(differences))]
            rows.append((rate, mean, [*row, f"{mean:+.3f} ± {error:.3f}"]))
    if not rows:
        return None
    head = ["optimizer", "learning rate", "seeds"]
    head.append(f"loss − {METHODS[REFERENCE].label}'s at that rate")
    cells = [head, *(cells for *_, cells in sorted(rows))]
    return format_table(cells, "<>>>", markdown=True) + "\n"


def _format(rows: Sequence[Mapping[str, str]], names: Sequence[str]) -> str:
    cells = [names, *([row[name] for name in names] for row in rows)]
    return format_table(cells, "<" + ">" * (len(names) - 1), markdown=True)


def _row(
    summary: Summary,
    reference: Summary | None,
    others: Mapping[str, Summary | None],
) -> dict[str, str]:
    row = {
        "optimizer": summary.label,
        "best learning rate": f"{summary.learning_rate:.1e}",
    }
    for metric in summary.metrics:
        scale, digits = (100, 1) if metric.endswith("accuracy") else (1, 3)
        name = metric.replace("_", " ") + (" (%)" if scale == 100 else "")
        finals = scale * summary.finals(metric)
        row[name] = f"{finals.mean():.{digits}f}{_error(spread(finals), digits)}"
    row["seeds"] = str(len(summary.runs))
    if reference is not None:
        mean, error = summary.minus(reference)
        row[f"loss − {reference.label}'s"] = (
            "" if summary is reference else f"{mean:+.3f}{_error(error, 3)}"
        )
    row["learning rates within 1 %"] = (
        f"{summary.good_range[0]:.1e} to {summary.good_range[1]:.1e} "
        f"({summary.width:.1f}×)"
        if len(summary.losses) >= search.FEWEST
        else "not searched"
    )
    for name, other in others.items():
        if other is not None:
            part = summary.steps_to(other.finals().mean())
            row[f"steps to {name}'s loss"] = (
                "not reached" if math.isnan(part) else f"{part:.2f}"
            )
    row["state bytes / parameter"] = f"{summary.cost['state_bytes_per_parameter']:.2f}"
    largest = [run.largest_update for run in summary.runs]
    row["largest update RMS / lr"] = f"{max(largest):.2f}"
    row["spikes"] = str(sum(run.spikes() for run in summary.runs))
    row["learning rates tried"] = str(len(summary.losses))
    return row


def _error(error: float, digits: int) -> str:
    return "" if math.isnan(error) else f" ± {error:.{digits}f}"

"""Reads the logs of small-models, and writes what they say as cells of tables.

A line of a log is a run: its method, learning rate and seed, its losses on held-out
text (step, nats a token) and its largest update (RMS, in learning rates); or what a
method's state takes.
"""

import collections
import functools
import json
import pathlib
import statistics
import sys

RESULTS = pathlib.Path(__file__).parent
LOGS = RESULTS / "small-models"
README = RESULTS.parents[1] / "README.md"
sys.path.append(str(RESULTS.parents[1] / "examples"))
from comparing import protocol, report  # noqa: E402
from table import format_table  # noqa: E402


def read(name):
    """Returns {method: {learning rate: {seed: run}}}, and each method's bytes."""
    runs = collections.defaultdict(lambda: collections.defaultdict(dict))
    taken = {}
    for line in (LOGS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if "bytes_per_parameter" in row:
            taken[row["method"]] = row["bytes_per_parameter"]
        else:
            by_seed = runs[row["method"]][row["learning_rate"]]
            by_seed[row["seed"]] = row | {"loss": row["validation"][-1][1]}
    return runs, taken


@functools.cache
def study():
    """Returns the study's results."""
    read = protocol.read(RESULTS / "study" / "protocol.md")
    return report.Results(read, RESULTS / "study")


def judged(task):
    """Returns {optimizer: {seed: run}} of a task of the study."""
    return study().judged(task)


def losses(by_seed):
    return {seed: run["loss"] for seed, run in by_seed.items()}


def best(runs, methods, seeds=1):
    """Returns the method, learning rate and runs with the lowest mean loss, or None."""
    found = [
        (statistics.mean(losses(by_seed).values()), method, rate, by_seed)
        for method in methods
        for rate, by_seed in runs.get(method, {}).items()
        if len(by_seed) >= seeds
    ]
    return min(found, key=lambda x: x[0])[1:] if found else None


def mean(values, digits=3):
    values = list(values)
    spread = f" ± {statistics.stdev(values):.{digits}f}" if values[1:] else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def difference(by_seed, other):
    """Returns the paired difference of two methods' losses as text."""
    ours, theirs = losses(by_seed), losses(other)
    pairs = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    text = f"{statistics.mean(pairs):+.3f}"
    if pairs[1:]:
        text += f" ± {statistics.stdev(pairs) / len(pairs) ** 0.5:.3f}"
    return f"{text} ({len(pairs)})"


def table(head, rows):
    """Returns a table in Markdown, its first column on the left."""
    return format_table([head, *rows], markdown=True) + "\n"

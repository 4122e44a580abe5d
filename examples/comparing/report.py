"""What a study has found so far, as a page of tables and a figure."""

import collections
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from comparing import log
from comparing.protocol import Part, Protocol, mean_and_error
from table import of_columns

ADAMW = "adamw"  # What data and sizes are counted by.
SIZES = ("gpt2-small", "gpt2-middle", "gpt2-large")
PLATEAU = 0.5  # Nats below the unigram cross-entropy that end it.
REDRAWN = 300  # Fits, for the error of what is read off one.

Row = Mapping[str, Any]
Runs = Mapping[int, Row]  # By seed.


class Results:
    """The runs of a study, by what they are for."""

    def __init__(self, study: Protocol, folder: Path):
        self.study, self.rows = study, log.read(folder / "runs.jsonl")
        self.losses = log.losses(self.rows)
        costs = folder / "costs.json"  # Seconds a step, by task and optimizer.
        self.seconds = json.loads(costs.read_text()) if costs.exists() else {}

    def done(self, part: Part) -> list[Row]:
        """Returns a part's finished runs."""
        return [row for row in self.rows.values() if row["part"] == part.name]

    def judged(self, task: str, budget: float | None = None) -> dict[str, Runs]:
        """Returns a task's judging runs; a chosen form stands for its optimizer.

        Those at so many tokens a parameter, by default as many as where it is judged
        first.
        """
        found: dict[str, dict[int, Row]] = collections.defaultdict(dict)
        parts = [
            part
            for part in self.study.parts.values()
            if (part.kind, part.task) == ("judge", task)
        ]
        budget = budget or (parts[0].tokens_per_parameter if parts else None)
        for part in parts:
            for row in self.done(part) if part.tokens_per_parameter == budget else ():
                found[row["optimizer"]][row["seed"]] = row
        for name, optimizer in self.study.optimizers.items():
            if optimizer.simplest_of and name not in found:
                if (form := self.study.form(name, self.losses)) in found:
                    found[name] = found[form]
        return dict(found)

    def comparisons(self) -> dict[str, dict[str, Runs]]:
        """Returns what was judged, by task, where that is more than one optimizer.

        Other budgets than the one that a task is judged at first have it in their name.
        """
        found: dict[str, dict[str, Runs]] = {}
        for task in self.study.tasks:
            budgets = [
                part.tokens_per_parameter
                for part in self.study.parts.values()
                if (part.kind, part.task) == ("judge", task)
            ]
            for budget in dict.fromkeys(budgets):
                first = budget == budgets[0]
                name = task if first else f"{task}, {budget:g} tokens a parameter"
                found[name] = self.judged(task, budget)
        return {name: judged for name, judged in found.items() if len(judged) > 1}

    def missing(self) -> list[str]:
        """Returns a line for each part that has runs to do."""
        lines = []
        for part in self.study.parts.values():
            of_one = {"tune": part.runs, "rates": 3, "judge": len(part.seeds)}
            done, most = len(self.done(part)), len(part.optimizers) * of_one[part.kind]
            over = part.kind != "judge" and all(
                self.study.chosen(part, name, self.losses) for name in part.optimizers
            )
            if done < most and not over:
                lines.append(f"- {part.name}: {done} of {most} runs are done")
        return lines


def losses(runs: Iterable[Row]) -> np.ndarray:
    """Returns final losses, infinite where training diverged."""
    values = [run["loss"] for run in runs]
    return np.asarray([math.inf if value is None else value for value in values])


def gaps(runs: Runs, others: Runs) -> np.ndarray:
    """Returns the differences of losses at the seeds that both have."""
    seeds = sorted(set(runs) & set(others))
    return losses(runs[s] for s in seeds) - losses(others[s] for s in seeds)


def verdict(differences: np.ndarray) -> str:
    """Returns a mean difference, and in a word what the protocol calls it."""
    if not len(differences) or not np.isfinite(differences).all():
        return ""
    mean, error = mean_and_error(differences)
    if math.isnan(error):
        return f"{mean:+.4f}"
    word = "" if abs(mean) < 2 * error else " better" if mean < 0 else " worse"
    return f"{mean:+.4f} ± {error:.4f}{word}"


class DataLaw:
    """L(D) = E + A (D / D₀)^−α through losses at some numbers of tokens D."""

    def __init__(self, tokens: Sequence[float], means: Any, errors: Any):
        self.tokens = np.asarray(tokens, float)
        noise = np.random.default_rng(0).normal(size=(REDRAWN, len(tokens)))
        values = np.vstack([means, means + np.nan_to_num(errors) * noise])
        best = np.full((len(values), 4), math.inf)
        for alpha in np.geomspace(0.05, 2, 150):
            terms = (self.tokens / self.tokens[0])[:, None] ** [[0, -alpha]]
            (e, a), *_ = np.linalg.lstsq(terms, values.T)
            left = np.sum((terms @ [e, a] - values.T) ** 2, 0)
            fits = np.stack([left, e, a, np.full_like(e, alpha)], 1)
            best = np.where(left[:, None] < best[:, :1], fits, best)
        self.fits = best[:, 1:]  # E, A and α; of the means, then of those redrawn.

    def losses(self) -> np.ndarray:
        """Returns the law's own losses at its tokens."""
        e, a, alpha = self.fits[0]
        return e + a * (self.tokens / self.tokens[0]) ** -alpha

    def tokens_for(self, mean: float, error: float) -> tuple[float, float]:
        """Returns how many tokens a loss takes, and the error of that."""
        noise = np.random.default_rng(1).normal(size=REDRAWN) * np.nan_to_num(error)
        values = [
            self.tokens[0] * ((loss - e) / a) ** (-1 / alpha) if loss > e else math.inf
            for loss, (e, a, alpha) in zip(
                [mean, *mean + noise], self.fits, strict=True
            )
        ]
        finite = np.isfinite(values).all()
        return values[0], float(np.std(values[1:])) if finite else math.inf


def adamws_budgets(results: Results) -> dict[float, Runs]:
    """Returns its runs at the smallest size, by tokens a parameter, if all are done."""
    seeds = {
        part.tokens_per_parameter: part.seeds
        for part in results.study.parts.values()
        if (part.kind, part.task) == ("judge", SIZES[0]) and ADAMW in part.optimizers
    }
    known = {b: results.judged(SIZES[0], b).get(ADAMW, {}) for b in sorted(seeds)}
    done = len(known) > 3 and all(len(known[b]) == len(seeds[b]) for b in known)
    return known if done else {}


def data_law(budgets: Mapping[float, Runs]) -> DataLaw | None:
    """Returns AdamW's, if its budgets are judged."""
    if not budgets:
        return None
    tokens = [next(iter(runs.values()))["tokens"] for runs in budgets.values()]
    return DataLaw(tokens, *np.transpose([_of(runs) for runs in budgets.values()]))


def budget_rows(budgets: Mapping[float, Runs]) -> list[dict[str, str]]:
    """Returns AdamW's losses, and those of the law through them."""
    if (law := data_law(budgets)) is None:
        return []
    return [
        {
            "tokens / parameter": f"{budget:g}",
            "seeds": str(len(runs)),
            "loss": "{:.4f} ± {:.4f}".format(*_of(runs)),
            "the law's": f"{of_law:.4f}",
        }
        for (budget, runs), of_law in zip(budgets.items(), law.losses(), strict=True)
    ]


def plateau(row: Row) -> float:
    """Returns after how many steps a run left its plateau, infinite if it did not."""
    every = row["steps"] / max(len(row["training"]), 1)
    below = np.asarray(row["training"]) < row["unigram"] - PLATEAU
    return every * (int(np.argmax(below)) + 1) if below.any() else math.inf


def task_rows(
    results: Results, task: str, judged: Mapping[str, Runs]
) -> list[dict[str, str]]:
    """Returns the optimizers of a task, the best first."""
    law = data_law(adamws_budgets(results)) if task == SIZES[0] else None
    rows = []
    for name in sorted(judged, key=lambda name: losses(judged[name].values()).mean()):
        runs, row = judged[name], next(iter(judged[name].values()))
        mean, error = _of(runs)
        cells = {"optimizer": name, "loss": f"{mean:.4f}", "seeds": str(len(runs))}
        for other in results.study.references:
            if other in judged:
                same = other == name
                cells[f"− {other}'s"] = (
                    "" if same else verdict(gaps(runs, judged[other]))
                )
        if law is not None:
            needed, spread = np.asarray(law.tokens_for(mean, error)) / row["tokens"]
            cells["AdamW's data for it"] = f"{needed:.2f} ± {spread:.2f}×"
        if task.startswith("bert"):
            steps = np.mean([plateau(run) for run in runs.values()])
            cells["steps to leave the plateau"] = f"{steps:.0f}"
        cells["state bytes / parameter"] = f"{row['state_bytes_per_parameter']:.2f}"
        cells["GFLOP / step"] = f"{row['matmul_flops_per_step'] / 1e9:.3f}"
        if name in (seconds := results.seconds.get(task, {})):
            cells["ms / step"] = f"{1e3 * seconds[name]:.1f}"
        rows.append(cells)
    return rows


def trend_rows(results: Results) -> list[dict[str, str]]:
    """Returns differences to AdamW over the sizes, and their slope."""
    judged = {size: results.judged(size) for size in SIZES}
    rows = []
    for name in results.study.optimizers:
        cells, x, y = {"optimizer": name}, [], []
        for size, runs in judged.items():
            differences = gaps(runs.get(name, {}), runs.get(ADAMW, {}))
            cells[size] = verdict(differences)
            for difference in differences:
                x.append(math.log10(next(iter(runs[name].values()))["parameters"]))
                y.append(difference)
        if name == ADAMW or len(set(x)) < 2 or not np.isfinite(y).all():
            continue
        x = np.asarray(x) - np.mean(x)
        slope = x @ y / (x @ x)
        left = np.asarray(y) - np.mean(y) - slope * x
        error = (left @ left / max(len(y) - 2, 1) / (x @ x)) ** 0.5
        rows.append({**cells, "a tenfold size": f"{slope:+.4f} ± {error:.4f}"})
    return rows


def settings_rows(results: Results, part: Part) -> list[dict[str, str]]:
    """Returns what a search has found, or the best so far."""
    rows = []
    for name in part.optimizers:
        runs = [row for row in results.done(part) if row["optimizer"] == name]
        if not runs:
            continue
        chosen = results.study.chosen(part, name, results.losses)
        settings = chosen or min(runs, key=lambda run: losses([run])[0])["settings"]
        at = losses(run for run in runs if run["settings"] == settings)
        done = f"{len(runs)}{'' if chosen else ' so far'}"
        cells = {"optimizer": name, "runs": done, "loss": f"{at.mean():.4f}"}
        rows.append(cells | {k: f"{v:g}" for k, v in settings.items()})
    return rows


def write(study: Protocol, folder: Path) -> str:
    """Writes `results.md` and `results.svg` into a study's folder; returns the page."""
    results = Results(study, folder)
    compared = results.comparisons()
    tables = {name: task_rows(results, name, runs) for name, runs in compared.items()}
    tables["AdamW's data"] = budget_rows(adamws_budgets(results))
    tables["Over sizes, loss − AdamW's"] = trend_rows(results)
    for part in study.parts.values():
        if part.kind != "judge":
            tables[f"Settings: {part.name}"] = settings_rows(results, part)
    sections = [
        f"## {name}\n\n{of_columns(rows)}" for name, rows in tables.items() if rows
    ]
    if missing := results.missing():
        sections.append("## What is missing\n\n" + "\n".join(missing))
    page = "\n\n".join(["# Results", *sections]) + "\n"
    (folder / "results.md").write_text(page, encoding="utf-8")
    if compared:
        draw(folder / "results.svg", results)
    return page


def draw(path: Path, results: Results) -> None:
    """Draws loss against bytes of state and against cost, a row for each task."""
    compared = results.comparisons()
    figure, grid = plt.subplots(
        len(compared),
        2,
        figsize=(11, 3.6 * len(compared)),
        squeeze=False,
        layout="constrained",
    )
    for axes, (task, judged) in zip(grid, compared.items(), strict=True):
        seconds = results.seconds.get(task)
        points: list[dict[str, tuple[float, float]]] = [{}, {}]
        for name, runs in judged.items():
            row, (mean, error) = next(iter(runs.values())), _of(runs)
            cost = row["matmul_flops_per_step"] / 1e9
            if seconds is not None:
                cost = 1e3 * seconds.get(name, math.nan)
            for axis, x, of_axis in zip(
                axes, (row["state_bytes_per_parameter"], cost), points, strict=True
            ):
                if math.isfinite(mean) and math.isfinite(x):
                    axis.errorbar(x, mean, np.nan_to_num(error), fmt="o", color="C0")
                    of_axis[name] = x, mean
        axes[0].set(ylabel=f"{task}: loss", xlabel="state, bytes a parameter")
        axes[1].set(xlabel="ms a step" if seconds else "GFLOP a step")
        for axis, of_axis in zip(axes, points, strict=True):
            _label(axis, of_axis)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _label(axis: Any, points: Mapping[str, tuple[float, float]]) -> None:
    """Writes the points' names in a column beside them, none over another."""
    low, high = axis.get_ylim()
    place = -math.inf
    for name, (x, y) in sorted(points.items(), key=lambda point: point[1][1]):
        place = max(y, place + 0.06 * (high - low))
        axis.annotate(
            name,
            (x, y),
            xytext=(1.02, place),
            textcoords=axis.get_yaxis_transform(),
            fontsize=8,
            verticalalignment="center",
            arrowprops={"arrowstyle": "-", "color": "0.8", "linewidth": 0.6},
            annotation_clip=False,
        )


def _of(runs: Runs) -> tuple[float, float]:
    return mean_and_error(losses(runs.values()))

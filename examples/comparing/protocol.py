"""A protocol: what is run, in what order, and which settings follow from it.

It is a page that people read; its blocks of TOML, one after the other, are what a
program reads. Which run comes next depends on the protocol and the finished runs alone,
so any number of processes agree on it.
"""

import dataclasses
import importlib
import json
import math
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax

from task import UserError

Settings = Mapping[str, float]
Losses = Mapping[str, float]  # Final losses of the finished runs by key.


class Run(NamedTuple):
    """What tells a run from all others."""

    part: str
    optimizer: str
    settings: Settings
    seed: int

    @property
    def key(self) -> str:
        return json.dumps([self.part, self.optimizer, dict(self.settings), self.seed])


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """One that is compared.

    Attributes:
        make: "module:function" of a schedule and settings, e.g. "my_code:my_optimizer".
        start: The settings that its search begins with, by name.
        fixed: More arguments of the function.
        like: Whose settings it takes over, instead of a search of its own.
        simplest_of: Forms, the simplest first, of which it is one: see `Protocol.form`.
        judged_on: The parts whose losses choose it.
        param_dtype: What it trains.
    """

    make: str = ""
    start: Settings = dataclasses.field(default_factory=dict)
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    like: str | None = None
    simplest_of: Sequence[str] = ()
    judged_on: Sequence[str] = ()
    param_dtype: str = "float32"


@dataclasses.dataclass(frozen=True)
class Part:
    """Runs on one task at one budget.

    Attributes:
        name: Its name.
        kind: "tune" searches all settings; "rates" the learning rate again, among three
            values; "judge" runs the settings found with fresh seeds, on other text.
        task: Of the protocol's tasks.
        tokens_per_parameter: The budget.
        optimizers: Who takes part.
        seeds: Of weights and data.
        settings: The part that settings come from; by default they are `start`.
        runs: Of "tune": how many each optimizer has.
        repeats: Of "tune": how many of them run the best settings again, with seed two.
    """

    name: str
    kind: str
    task: str
    tokens_per_parameter: float
    optimizers: Sequence[str]
    seeds: Sequence[int]
    settings: str = ""
    runs: int = 0
    repeats: int = 0


@dataclasses.dataclass(frozen=True)
class Protocol:
    """All of a study.

    Attributes:
        corpora: Texts that are learnt from.
        tasks: Model, batch size and evaluations by name.
        optimizers: Those compared.
        grid: The values of each setting, in order; a search goes from one to the next.
        parts: By name, in the order in which they are run.
        references: The optimizers that others are told the differences to.
    """

    corpora: Sequence[str]
    tasks: Mapping[str, Mapping[str, Any]]
    optimizers: Mapping[str, Optimizer]
    grid: Mapping[str, Sequence[float]]
    parts: Mapping[str, Part]
    references: Sequence[str] = ("adamw", "muon")

    def pending(self, losses: Losses) -> Iterator[Run]:
        """Yields runs that can be begun now, the first in turn first."""
        for part in self.parts.values():
            every = [self.runs(part, name, losses) for name in part.optimizers]
            # By turns: at any time all have had equal numbers.
            turns = ((k, run) for runs in every for k, run in enumerate(runs))
            for _, run in sorted(turns, key=lambda turn: turn[0]):
                if run.key not in losses:
                    yield run

    def runs(self, part: Part, name: str, losses: Losses) -> list[Run]:
        """Returns an optimizer's runs in turn, as far as those done tell.

        When all of them are done, there is no other.
        """
        if part.kind == "tune":
            return self._search(part, name, losses)
        settings: Settings | None = self.optimizers[name].start
        if part.settings:
            settings = self.chosen(self.parts[part.settings], name, losses)
        if settings is None:
            return []
        values: list[Settings | None] = [settings]
        if part.kind == "rates":
            values += [self._step(settings, "learning_rate", k) for k in (-1, 1)]
        return [Run(part.name, name, s, k) for s in values if s for k in part.seeds]

    def chosen(self, part: Part, name: str, losses: Losses) -> Settings | None:
        """Returns the settings that a search found, None until it is over."""
        optimizer = self.optimizers[name]
        if optimizer.simplest_of and name not in part.optimizers:
            form = self.form(name, losses)
            return self.chosen(part, form, losses) if form else None
        if optimizer.like:
            return self.chosen(part, optimizer.like, losses)
        runs = self.runs(part, name, losses)
        if not runs or any(run.key not in losses for run in runs):
            return None
        # Where the best ran again with another seed, among those.
        sums = {
            run.key: sum(losses.get(run._replace(seed=s).key, 0.0) for s in part.seeds)
            for run in runs
            if run.seed == runs[-1].seed
        }
        best = min(sums, key=lambda key: sums[key])
        return json.loads(best)[2] if math.isfinite(sums[best]) else None

    def form(self, name: str, losses: Losses) -> str | None:
        """Returns the simplest form that is within a standard error of the best.

        Of the differences from the best, paired by seed, over all of `judged_on`.
        """
        optimizer = self.optimizers[name]
        rows = {}
        for form in optimizer.simplest_of:
            parts = [
                self.runs(self.parts[p], form, losses) for p in optimizer.judged_on
            ]
            keys = [run.key for runs in parts for run in runs]
            if not all(parts) or any(key not in losses for key in keys):
                return None
            rows[form] = np.asarray([losses[key] for key in keys])
        best = rows[min(rows, key=lambda form: rows[form].mean())]
        gaps = ((form, *mean_and_error(rows[form] - best)) for form in rows)
        return next(form for form, mean, error in gaps if mean <= error)

    def build(self, name: str, losses: Losses) -> Callable[..., Any]:
        """Returns an optimizer's function of a schedule and settings."""
        fixed: dict[str, Any] = {}
        while not (optimizer := self.optimizers[name]).make:
            fixed = {**optimizer.fixed, **fixed}
            name = optimizer.like or self.form(name, losses) or ""
        module, _, function = optimizer.make.partition(":")
        make = getattr(importlib.import_module(module), function)
        fixed = {**optimizer.fixed, **fixed}
        return lambda schedule, **settings: make(schedule, **settings, **fixed)

    def _search(self, part: Part, name: str, losses: Losses) -> list[Run]:
        """Goes along one setting at a time for as long as the loss falls."""
        runs: dict[str, Run] = {}

        def loss(settings: Settings) -> float:
            run = Run(part.name, name, settings, part.seeds[0])
            if run.key not in runs and len(runs) == part.runs - part.repeats:
                raise StopIteration
            runs[run.key] = run
            return losses[run.key]

        best: Settings = self.optimizers[name].start
        before: Settings = {}
        try:
            loss(best)
            while best != before:
                before = best
                for setting in best:
                    for direction in (1, -1):
                        start = best
                        while (after := self._step(best, setting, direction)) and loss(
                            after
                        ) < loss(best):
                            best = after
                        if best != start:
                            break
        except KeyError:
            return list(runs.values())
        except StopIteration:
            pass
        # A search that ended early leaves more runs for the second seed.
        ranked = sorted(runs.values(), key=lambda run: losses[run.key])
        again = ranked[: part.runs - len(runs)]
        return [*runs.values(), *(run._replace(seed=part.seeds[1]) for run in again)]

    def _step(self, settings: Settings, name: str, direction: int) -> Settings | None:
        values = self.grid[name]
        index = values.index(settings[name]) + direction
        inside = 0 <= index < len(values)
        return {**settings, name: values[index]} if inside else None


def _check_names(study: Protocol) -> None:
    """Raises ValueError if one part of a protocol names another that isn't there."""

    def check(where: str, names: Sequence[str], known: Iterable[str]) -> None:
        for name in names:
            if name not in known:
                raise ValueError(f"{where}: {name!r} is none of {', '.join(known)}")

    for name, optimizer in study.optimizers.items():
        others = [optimizer.like] if optimizer.like else optimizer.simplest_of
        check(f"optimizer {name}", others, study.optimizers)
        check(f"judged_on of optimizer {name}", optimizer.judged_on, study.parts)
        if not others and ":" not in optimizer.make:
            raise ValueError(f"optimizer {name}: make must be module:function")
    for part in study.parts.values():
        check(f"kind of part {part.name}", [part.kind], ("tune", "rates", "judge"))
        check(f"task of part {part.name}", [part.task], study.tasks)
        check(f"optimizers of part {part.name}", part.optimizers, study.optimizers)
        check(
            f"settings of part {part.name}",
            part.settings and [part.settings],
            study.parts,
        )
        if part.kind == "tune" and len(part.seeds) < 2:
            raise ValueError(f"part {part.name}: tuning needs two seeds")


def mean_and_error(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Returns the mean and its standard error, NaN of a single value."""
    error = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else math.nan
    return float(np.mean(values)), float(error)


def make_schedule(peak: Any, warmup: Any, steps: Any) -> optax.Schedule:
    """Linear warmup over a part of the steps, then a cosine to a tenth of the peak."""

    def schedule(count: Any) -> Any:
        first = jnp.maximum(jnp.round(warmup * steps), 1)
        part = jnp.clip((count - first) / jnp.maximum(steps - first, 1), 0, 1)
        after = 0.1 + 0.9 * 0.5 * (1 + jnp.cos(jnp.pi * part))
        return peak * jnp.where(count < first, (count + 1) / (first + 1), after)

    return schedule


def read(path: Path) -> Protocol:
    """Reads a protocol's page.

    Raises:
        UserError: Something in it is missing or unknown.
    """
    text = path.read_text(encoding="utf-8")
    try:
        values = tomllib.loads("\n".join(re.findall(r"(?ms)^```toml\n(.*?)^```", text)))
        sets = values.pop("optimizer_sets", {})
        for part in values["part"]:
            names = part["optimizers"]
            part["optimizers"] = sets[names] if isinstance(names, str) else names
        for name, optimizer in values["optimizer"].items():
            for setting, value in optimizer.get("start", {}).items():
                if value not in values["grid"].get(setting, ()):
                    raise ValueError(f"{name}: {setting} {value} isn't on the grid")
        study = Protocol(
            parts={part["name"]: Part(**part) for part in values.pop("part")},
            optimizers={k: Optimizer(**v) for k, v in values.pop("optimizer").items()},
            tasks=values.pop("task"),
            grid={k: list(map(float, v)) for k, v in values.pop("grid").items()},
            **values,
        )
        _check_names(study)
        return study
    except (tomllib.TOMLDecodeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: {type(error).__name__}: {error}") from error

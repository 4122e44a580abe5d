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
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import optax

from pretraining.errors import UserError

Settings = Mapping[str, float]


class Run(NamedTuple):
    """What tells a run from all others."""

    part: str
    optimizer: str
    settings: Settings
    seed: int

    @property
    def key(self) -> str:
        return json.dumps([self.part, self.optimizer, dict(self.settings), self.seed])


Losses = Mapping[str, float]  # Final losses of the finished runs by key.


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """One that is compared.

    Attributes:
        make: "module:function" of a schedule and settings, e.g. "my_code:my_optimizer".
        start: The settings that its search begins with, by name.
        fixed: More arguments of the function.
        like: Whose settings it takes over, instead of a search of its own.
        simplest_of: Forms, the simplest first, of which it is the one that
            `Protocol.form` chooses.
        judged_on: The parts whose losses choose it.
    """

    make: str = ""
    start: Settings = dataclasses.field(default_factory=dict)
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    like: str | None = None
    simplest_of: Sequence[str] = ()
    judged_on: Sequence[str] = ()


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
        settings: The part that settings come from; none for "tune".
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
        parts: In the order in which they are run.
    """

    corpora: Sequence[str]
    tasks: Mapping[str, Mapping[str, Any]]
    optimizers: Mapping[str, Optimizer]
    grid: Mapping[str, Sequence[float]]
    parts: Sequence[Part]

    def part(self, name: str) -> Part:
        """Returns a part by its name."""
        return {part.name: part for part in self.parts}[name]

    def pending(self, losses: Losses) -> Iterator[Run]:
        """Yields runs that can be begun now, the first in turn first."""
        for part in self.parts:
            runs = [
                (number, order, run)
                for order, name in enumerate(part.optimizers)
                for number, run in self._pending_of(part, name, losses)
            ]
            # By turns: at any time all have had equal numbers.
            yield from (run for *_, run in sorted(runs, key=lambda r: r[:2]))

    def count(self) -> dict[str, int]:
        """Returns how many runs each part has in all."""
        return {
            part.name: len(part.optimizers)
            * {"tune": part.runs, "rates": 3, "judge": len(part.seeds)}[part.kind]
            for part in self.parts
        }

    def runs(self, part: Part, name: str, losses: Losses) -> list[Run]:
        """Returns an optimizer's judging runs, empty while settings aren't known."""
        settings = self.chosen(self.part(part.settings), name, losses)
        if settings is None:
            return []
        return [Run(part.name, name, settings, seed) for seed in part.seeds]

    def chosen(self, part: Part, name: str, losses: Losses) -> Settings | None:
        """Returns the settings that a search found, None until it is over."""
        optimizer = self.optimizers[name]
        if optimizer.simplest_of:
            form = self.form(name, losses)
            # Where the forms were not searched, it has a search of its own.
            if form is None or form in part.optimizers:
                return None if form is None else self.chosen(part, form, losses)
        if optimizer.like:
            return self.chosen(part, optimizer.like, losses)
        done = self._searched(part, name, losses)
        if not isinstance(done, list):
            return None
        sums = {}
        for run in done:
            seeds = [run, self._again(part, run)] if part.kind == "tune" else [run]
            if any(seed.key not in losses for seed in seeds):
                return None
            sums[run.key] = sum(losses[seed.key] for seed in seeds)
        best = min(done, key=lambda run: sums[run.key])
        return best.settings if math.isfinite(sums[best.key]) else None

    def form(self, name: str, losses: Losses) -> str | None:
        """Returns the simplest form that is within a standard error of the best.

        Of the differences from the best, paired by seed, over all of `judged_on`.
        """
        optimizer = self.optimizers[name]
        names = optimizer.simplest_of
        rows = {}
        for form in names:
            parts = [self.part(part) for part in optimizer.judged_on]
            runs = [run for part in parts for run in self.runs(part, form, losses)]
            if not runs or any(run.key not in losses for run in runs):
                return None
            rows[form] = np.asarray([losses[run.key] for run in runs])
        best = rows[min(rows, key=lambda form: rows[form].mean())]
        for form in names:
            mean, error = mean_and_error(rows[form] - best)
            if mean <= error or not mean:
                return form
        raise AssertionError("the best is within its own error")

    def build(self, name: str, losses: Losses) -> Callable[..., Any]:
        """Returns an optimizer's function of a schedule and settings."""
        optimizer = self.optimizers[name]
        fixed = dict(optimizer.fixed)
        while not optimizer.make:
            other = self.form(name, losses) if optimizer.simplest_of else optimizer.like
            assert other is not None
            name, optimizer = other, self.optimizers[other]
            fixed = {**optimizer.fixed, **fixed}
        module, _, function = optimizer.make.partition(":")
        make = getattr(importlib.import_module(module), function)
        return lambda schedule, **settings: make(schedule, **settings, **fixed)

    def _pending_of(
        self, part: Part, name: str, losses: Losses
    ) -> list[tuple[int, Run]]:
        if part.kind == "judge":
            runs = self.runs(part, name, losses)
        else:
            searched = self._searched(part, name, losses)
            runs = searched if isinstance(searched, list) else []
            if isinstance(searched, Run):
                done = sum(
                    1 for key in losses if json.loads(key)[:2] == [part.name, name]
                )
                return [(done, searched)]
            if part.kind == "tune":
                runs = [self._again(part, run) for run in runs]
        first = part.runs - part.repeats if part.kind == "tune" else 0
        return [
            (first + number, run)
            for number, run in enumerate(runs)
            if run.key not in losses
        ]

    def _again(self, part: Part, run: Run) -> Run:
        return run._replace(seed=part.seeds[1])

    def _searched(
        self, part: Part, name: str, losses: Losses
    ) -> Run | list[Run] | None:
        """Returns the next run of a search, or at its end those to choose among.

        None while what it begins with isn't known.
        """
        if part.kind == "rates":
            base = self.chosen(self.part(part.settings), name, losses)
            if base is None:
                return None
            rates = [self._neighbour(base, "learning_rate", d) for d in (0, -1, 1)]
            return [Run(part.name, name, s, part.seeds[0]) for s in rates if s]
        seen: dict[str, Run] = {}

        def loss(settings: Settings) -> float | None:
            run = Run(part.name, name, settings, part.seeds[0])
            seen[run.key] = run
            return losses.get(run.key)

        wanted = self._descend(self.optimizers[name].start, loss)
        if wanted is not None and len(seen) <= part.runs - part.repeats:
            return Run(part.name, name, wanted, part.seeds[0])
        done = [run for key, run in seen.items() if key in losses]
        # A search that ended early leaves more runs for the second seed.
        left = part.runs - len(done)
        return sorted(done, key=lambda run: losses[run.key])[:left]

    def _descend(
        self, best: Settings, loss: Callable[[Settings], float | None]
    ) -> Settings | None:
        """Goes along one setting at a time for as long as the loss falls.

        Returns the settings to try next, None where no neighbour is better.
        """
        lowest = loss(best)
        if lowest is None:
            return best
        improved = True
        while improved:
            improved = False
            for name in best:
                for direction in (1, -1):
                    moved = False
                    while (
                        settings := self._neighbour(best, name, direction)
                    ) is not None:
                        value = loss(settings)
                        if value is None:
                            return settings
                        if not value < lowest:
                            break
                        best, lowest, moved, improved = settings, value, True, True
                    if moved:
                        break
        return None

    def _neighbour(
        self, settings: Settings, name: str, direction: int
    ) -> Settings | None:
        values = self.grid[name]
        index = values.index(settings[name]) + direction
        if not 0 <= index < len(values):
            return None
        return {**settings, name: values[index]}


def mean_and_error(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Returns the mean and its standard error, NaN of a single value."""
    error = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else math.nan
    return float(np.mean(values)), float(error)


def make_schedule(peak: Any, warmup: Any, steps: Any) -> optax.Schedule:
    """Linear warmup over a part of the steps, then a cosine to a tenth of the peak."""
    import jax.numpy as jnp

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
    blocks = re.findall(
        r"^```toml\n(.*?)^```", path.read_text(encoding="utf-8"), re.M | re.S
    )
    try:
        values = tomllib.loads("\n".join(blocks))
        shared = values.pop("optimizer_sets", {})
        parts = values.pop("part")
        for part in parts:
            if isinstance(part["optimizers"], str):
                part["optimizers"] = shared[part["optimizers"]]
        optimizers = values.pop("optimizer")
        values["grid"] = {k: list(map(float, v)) for k, v in values["grid"].items()}
        protocol = Protocol(
            optimizers={k: Optimizer(**v) for k, v in optimizers.items()},
            parts=[Part(**part) for part in parts],
            tasks=values.pop("task"),
            **values,
        )
        for name, optimizer in protocol.optimizers.items():
            for setting, value in optimizer.start.items():
                if value not in protocol.grid[setting]:
                    raise ValueError(f"{name}: {setting} {value} isn't on the grid")
    except (tomllib.TOMLDecodeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: {type(error).__name__}: {error}") from error
    return protocol

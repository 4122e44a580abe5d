"""What a person watching a run sees."""

import sys
import time
from collections.abc import Mapping
from typing import Any, Self

import jax
from tqdm import tqdm


def terminal_bar(**options: Any) -> tqdm:
    """Returns a progress bar that shows on a terminal, of the first process alone."""
    hidden = not sys.stderr.isatty() or jax.process_index() > 0
    return tqdm(dynamic_ncols=True, disable=hidden, **options)


class Progress:
    """A progress bar on a terminal, and a line for each evaluation anywhere."""

    def __init__(self, start: int, steps: int):
        self._bar = terminal_bar(initial=start, total=steps, unit="step")
        self._width = len(str(steps))
        self._values: dict[str, str] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def advance(self) -> None:
        """Counts a step."""
        self._bar.update()

    def show(self, values: Mapping[str, str]) -> None:
        """Changes values that stand beside the bar."""
        self._values |= values
        self._bar.set_postfix_str(self._text(", "), refresh=False)

    def print_line(self, step: int) -> None:
        """Prints a line with these values that stays."""
        tqdm.write(f"step {step:>{self._width}}  {self._text('  ')}", file=sys.stdout)
        sys.stdout.flush()

    def _text(self, separator: str) -> str:
        return separator.join(f"{name} {text}" for name, text in self._values.items())


class Throughput:
    """Tokens per second of training alone."""

    def __init__(self, tokens_per_step: int):
        self._tokens_per_step = tokens_per_step
        self.restart()

    def restart(self) -> None:
        """Forgets the time since the last measurement: it was spent on other things."""
        self._steps, self._since = 0, time.perf_counter()

    def count_step(self) -> None:
        self._steps += 1

    def measure(self) -> float:
        """Returns the rate since the last measurement."""
        seconds = time.perf_counter() - self._since
        rate = self._steps * self._tokens_per_step / seconds
        self.restart()
        return rate

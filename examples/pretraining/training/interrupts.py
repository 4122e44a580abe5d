"""What Ctrl-C and SIGTERM do: end the process, or ask it to save and stop."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Self


class InterruptRequest:
    """Within it the first SIGINT or SIGTERM sets `received`, a second one kills."""

    received = False

    def __enter__(self) -> Self:
        self._previous = {
            number: signal.signal(number, self._receive)
            for number in (signal.SIGINT, signal.SIGTERM)
            # As shells have it for what they run in the background.
            if signal.getsignal(number) != signal.SIG_IGN
        }
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def quit_on_ctrl_c(
    active: bool = True, *, afterwards: signal.Handlers | None = None
) -> Iterator[None]:
    """Within it Ctrl-C ends the process, in a line and with exit code 130.

    There and then: libraries may catch an exception, raise others instead, or lose it
    in a destructor. It leaves no more behind than any other way to kill a process.

    Args:
        active: Whether to do so.
        afterwards: What Ctrl-C does afterwards, by default what it did before.
    """
    previous = signal.getsignal(signal.SIGINT)
    if not active or previous == signal.SIG_IGN:  # As for `InterruptRequest`.
        yield
        return
    signal.signal(signal.SIGINT, _quit)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous if afterwards is None else afterwards)


@contextlib.contextmanager
def before_quitting(act: Callable[[], str]) -> Iterator[None]:
    """Lets `quit_on_ctrl_c` call `act` in the end, and say what that returns."""
    _ACTS.append(act)
    try:
        yield
    finally:
        _ACTS.remove(act)


_ACTS: list[Callable[[], str]] = []


def _quit(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)
    words = ["interrupted", *filter(None, (act() for act in reversed(_ACTS)))]
    line = f"{Path(sys.argv[0]).name}: {'; '.join(words)}\n"
    with contextlib.suppress(OSError):  # Nobody may read it.
        os.write(2, line.encode())
    os._exit(130)

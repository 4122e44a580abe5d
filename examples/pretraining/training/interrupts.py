"""Ctrl-C and SIGTERM as a request to save and stop."""

import signal
from types import FrameType
from typing import Self


class InterruptRequest:
    """Within it the first SIGINT or SIGTERM sets `received`, a second one kills."""

    received = False

    def __enter__(self) -> Self:
        self._previous = {
            number: signal.signal(number, self._receive)
            for number in (signal.SIGINT, signal.SIGTERM)
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

"""What Ctrl-C and SIGTERM do: end the process, raise, or ask to save and stop."""

import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any, Self

EXAMPLES = Path(__file__).parents[2]


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


def quit_while_importing() -> None:
    """Lets Ctrl-C end one of our scripts in a line, until `raise_again`.

    At once, and not by an exception: imports may catch that or raise others instead.
    """
    _replace(signal.default_int_handler, _quit)


def raise_again() -> None:
    """Lets Ctrl-C raise KeyboardInterrupt, as Python does, and never in vain."""
    if _replace(_quit, signal.default_int_handler):
        sys.unraisablehook = raise_later


def end_quietly() -> None:
    """Lets Ctrl-C end the process without a word: all has been said."""
    _replace(signal.default_int_handler, signal.SIG_DFL)


def raise_later(unraisable: Any) -> None:
    """Raises a KeyboardInterrupt anew that a destructor lost; for `sys`'s hook."""
    if unraisable.exc_type is KeyboardInterrupt:
        threading.Timer(0.01, os.kill, [os.getpid(), signal.SIGINT]).start()
    else:
        sys.__unraisablehook__(unraisable)


def _replace(old: Any, new: Any) -> bool:
    """Replaces the handler of SIGINT if one of our scripts runs, and says whether."""
    script = getattr(sys.modules["__main__"], "__file__", None)
    if script is None or Path(script).resolve().parent != EXAMPLES:
        return False
    if signal.getsignal(signal.SIGINT) is not old:
        return False
    signal.signal(signal.SIGINT, new)
    return True


def _quit(number: int, frame: FrameType | None) -> None:
    os.write(2, f"{Path(sys.argv[0]).name}: interrupted\n".encode())
    os._exit(128 + number)

"""Settings that the examples' tests share."""

import signal
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def same_ctrl_c() -> Iterator[None]:
    """What ends a script, `cli.run`, leaves Ctrl-C to end the process."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)

"""Settings that the examples' tests share."""

import signal

import pytest


@pytest.fixture(autouse=True)
def same_ctrl_c():
    """Ctrl-C raises: what is started in the background would ignore it.

    And it does so again after `command_line.run`, which lets it end the process.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)

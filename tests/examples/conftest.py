"""Settings that the examples' tests share."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def same_ctrl_c() -> Iterator[None]:
    """Ctrl-C raises: what is started in the background would ignore it.

    And it does so again after a test of `cli.run`, which lets it end the process.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def run_code(tmp_path: Path) -> Callable[[str], subprocess.CompletedProcess[str]]:
    """Runs code in a process of its own, in `tmp_path`, with the examples' modules."""

    def run(code: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'examples'}"},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )

    return run

"""A run that is killed, interrupted or out of disk loses nothing that was saved."""

import contextlib
import os
import resource
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from pretraining.errors import CannotSave
from pretraining.files import write_atomically
from pretraining.training import metrics, runs
from pretraining.training.interrupts import InterruptRequest, quit_on_ctrl_c
from pretraining.training.plots import plot_curve

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "pretrain_gpt2.py"
ARGUMENTS = [
    *("--vocab-size", "300", "--seq-len", "8", "--batch-size", "4", "--steps", "40"),
    *("--log-every", "1", "--eval-every", "10", "--eval-batches", "1"),
    *("--checkpoint-every", "20"),
]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory):
    """Starts the script in a new process on one device."""
    folder = tmp_path_factory.mktemp("it's ünder $HOME; ")
    sentences = (f"Sentence {i} says {i * i} times {i % 7}.\n" for i in range(2_000))
    (folder / "text.txt").write_text("".join(sentences))
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XLA_FLAGS": "",
    }

    def start_process(*arguments: str, setup: str = "true") -> subprocess.Popen[str]:
        command = [sys.executable, str(SCRIPT), *arguments]
        return subprocess.Popen(
            ["sh", "-c", f'{setup} && exec "$@"', "sh", *command],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    start_process.folder = folder
    start_process.environment = environment
    return start_process


def finish(process: subprocess.Popen[str]) -> str:
    output, error = process.communicate()
    assert process.returncode == 0, error
    return output


def read_until(process: subprocess.Popen[str], beginning: str) -> None:
    for line in process.stdout:
        if line.startswith(beginning):
            return
    pytest.fail(f"no line {beginning!r}: {process.stderr.read()}")


def read_run(folder: Path) -> tuple[list, dict]:
    """Returns the metrics without timings, and the last checkpoint's arrays."""
    rows = metrics.read(folder)
    for row in rows:
        row.pop("tokens_per_second", None)
    with ocp.StandardCheckpointer() as checkpointer:
        state = checkpointer.restore(folder.absolute() / "checkpoints" / "40" / "state")
    return rows, state


@pytest.fixture(scope="module")
def straight(start) -> tuple[list, dict]:
    finish(start("--text", "text.txt", *ARGUMENTS, "--output", "straight"))
    return read_run(start.folder / "straight")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_stopped_and_resumed_equals_straight(start, straight, number: signal.Signals):
    name = number.name
    process = start("--text", "text.txt", *ARGUMENTS, "--output", name)
    read_until(process, "step 30")
    process.send_signal(number)
    _, error = process.communicate()
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert f"is saved in {name}\n" in error
        assert f"--resume --output {name}\n" in error
        command = error.partition("Continue: ")[2]  # From anywhere, as it stands.
        assert "Traceback" not in error
    else:
        command = shlex.join(
            [sys.executable, str(SCRIPT), "--resume", "--output", name]
        )
        command = f"cd {shlex.quote(str(start.folder))} && {command}"
        assert process.returncode == -number
    assert "40" not in os.listdir(start.folder / name / "checkpoints")

    process = subprocess.run(
        command,
        shell=True,
        cwd="/",
        env=start.environment,
        capture_output=True,
        text=True,
    )
    assert "step 40" in process.stdout, process.stderr
    rows, state = read_run(start.folder / name)
    straight_rows, straight_state = straight
    assert rows == straight_rows
    jax.tree.map(np.testing.assert_array_equal, state, straight_state)


def test_a_full_disk_keeps_what_is_saved(start):
    finish(start("--text=text.txt", *ARGUMENTS, "--steps=20", "--output=full"))
    again = ["--resume", "--output=full", "--steps=40"]
    # Blocks of 512 bytes; compiled programs would not fit either.
    limit = "ulimit -f 100 && export JAX_ENABLE_COMPILATION_CACHE=false"
    process = start(*again, setup=limit)
    _, error = process.communicate()
    assert process.returncode == 2, error
    assert "cannot save step 40: File too large; step 20 is saved in full\n" in error
    assert "Traceback" not in error, error
    finish(start(*again))
    assert sorted(os.listdir(start.folder / "full" / "checkpoints")) == ["20", "40"]


@pytest.fixture
def full_disk():
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("full_disk")
def test_a_full_disk_names_the_file_that_it_keeps(tmp_path: Path):
    path = tmp_path / "file.png"
    write_atomically(path, "old")
    for write in (
        lambda: write_atomically(path, 2_000 * "new"),
        lambda: plot_curve(path, "title", [{"step": 1, "loss": 1}], {}),
    ):
        with pytest.raises(OSError, match=r"too large: .*file\.png'$"):
            write()
        assert os.listdir(tmp_path) == ["file.png"]
        assert path.read_text() == "old"


@pytest.mark.usefixtures("full_disk")
def test_metrics_on_a_full_disk_hide_nothing_that_went_wrong_first(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    with pytest.raises(OSError, match=r"too large: .*metrics\.jsonl'$"):
        with metrics.MetricsWriter(tmp_path, 0) as writer:
            for step in range(1000):
                writer.write(step, loss=1.5)
    with pytest.raises(CannotSave, match="first"):
        with metrics.MetricsWriter(tmp_path, 1000) as writer:
            with contextlib.suppress(OSError):
                writer.write(2000, text=1000 * "loss")
            raise CannotSave("first")
    assert capfd.readouterr().err == ""


def test_tensorboard_reads_what_is_written(tmp_path: Path):
    with metrics.MetricsWriter(tmp_path, 4) as writer:
        writer.write(5, loss=1.5)
    (path,) = (tmp_path / "tensorboard").iterdir()
    content, events = path.read_bytes(), []
    while content:  # Length, its checksum, the event, its checksum.
        size = int.from_bytes(content[:8], "little")
        events.append(Event.FromString(content[12 : 12 + size]))
        content = content[12 + size + 4 :]
    version, start, loss = events
    assert version.file_version == "brain.Event:2"
    assert (start.step, start.session_log.status) == (5, SessionLog.START)
    (value,) = loss.summary.value
    assert (loss.step, value.tag, value.simple_value) == (5, "loss", 1.5)


SCRIPTS = {path.stem for path in SCRIPT.parent.glob("*.py")}


@pytest.mark.parametrize("script", sorted(SCRIPTS - {"gpt2_in_one_file"}))
def test_ctrl_c_while_a_script_imports_is_a_line(script: str, tmp_path: Path):
    # Stands for what takes long, and swallows what is raised in it.
    (tmp_path / "jax.py").write_text(
        "import os, signal\n"
        "try:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "except BaseException:\n"
        "    pass\n"
    )
    path = ROOT / "examples" / f"{script}.py"
    process = subprocess.run(
        [sys.executable, str(path)],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert process.stderr == f"{script}.py: interrupted\n"
    assert process.returncode == 130


def test_what_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with InterruptRequest() as request:
            os.kill(os.getpid(), signal.SIGINT)
            assert not request.received
            os.kill(os.getpid(), signal.SIGTERM)
            assert request.received
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


QUITS_IN_A_DESTRUCTOR = """
import os, signal, sys
from pathlib import Path
from pretraining import cli
from pretraining.training import runs

class Hides:
    def __del__(self):
        try:
            os.kill(os.getpid(), signal.SIGINT)
        finally:
            return

def main():
    options = runs.RunOptions(output="run", resume=bool(runs.steps(Path("run"))))
    with runs.claim("name", options):
        Hides()
        print("not reached")

sys.argv = ["script.py"]
cli.run(main)
"""


@pytest.mark.parametrize("saved", [False, True])
def test_ctrl_c_outside_training_is_not_lost(
    saved: bool, run_code: Any, tmp_path: Path
):
    if saved:
        (tmp_path / "run" / "checkpoints" / "7").mkdir(parents=True)
    process = run_code(QUITS_IN_A_DESTRUCTOR)
    first, *rest = process.stderr.splitlines()
    assert process.returncode == 130
    assert process.stdout == ""
    if saved:
        assert first == "script.py: interrupted; step 7 is saved in run"
        (line,) = rest
        assert line.startswith("Continue: cd ")
        assert line.endswith("/script.py --resume --output run")
    else:
        assert [first, *rest] == ["script.py: interrupted"]
        assert not (tmp_path / "run").exists()


def test_nothing_is_left_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Whoever takes a part of the examples gets no hook with it."""
    before = signal.getsignal(signal.SIGINT), sys.unraisablehook
    with quit_on_ctrl_c():
        assert signal.getsignal(signal.SIGINT) != before[0]
        with runs.claim("name", runs.RunOptions(output=str(tmp_path / "run"))):
            with InterruptRequest():
                assert sys.unraisablehook is before[1]
    assert (signal.getsignal(signal.SIGINT), sys.unraisablehook) == before
    with quit_on_ctrl_c(False):
        assert signal.getsignal(signal.SIGINT) == before[0]

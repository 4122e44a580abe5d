"""A run that is interrupted or out of disk loses nothing that was saved."""

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from running import metrics
from running.command_line import interrupts
from tests.examples.launching import ROOT, environment

SCRIPT = ROOT / "examples" / "pretrain_gpt2.py"
ARGUMENTS = [
    *("--text=text.txt", "--size=nano", "--vocab-size=300", "--seq-len=8"),
    *("--batch-size=4", "--log-every=1", "--eval-every=10", "--eval-batches=1"),
    "--checkpoint-every=20",
]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Starts the script in a new process on one device."""
    folder = tmp_path_factory.mktemp("it's ünder $HOME; ")
    sentences = (f"Sentence {i} says {i * i} times {i % 7}.\n" for i in range(2_000))
    (folder / "text.txt").write_text("".join(sentences))

    def start_process(command, cwd=folder):
        return subprocess.Popen(
            ["sh", "-c", command, "sh", sys.executable, str(SCRIPT), *ARGUMENTS],
            cwd=cwd,
            env=environment(folder),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start_process


@pytest.mark.slow
def test_ctrl_c_saves_and_says_how_to_go_on_and_a_full_disk_keeps_that(start):
    process = start('exec "$@" --steps 100000 --output run')
    for line in process.stdout:
        if line.startswith("step     30"):
            break
    process.send_signal(signal.SIGINT)
    _, error = process.communicate()
    assert process.returncode == 130, error
    assert "Traceback" not in error
    assert "is saved in run\n" in error
    go_on = error.partition("Continue: ")[2].strip()  # From anywhere, as it stands.
    step = int(error.partition("interrupted; step ")[2].partition(" ")[0])
    go_on = f"{go_on} --steps {step + 2}"

    # Blocks of 512 bytes; compiled programs would not fit either.
    limit = "ulimit -f 100 && export JAX_ENABLE_COMPILATION_CACHE=false"
    process = start(f"{limit} && {go_on}", Path("/"))
    _, error = process.communicate()
    assert process.returncode == 2, error
    line = f"cannot save step {step + 2}: File too large; step {step} is saved in run\n"
    assert line in error
    assert "Traceback" not in error, error
    process = start(go_on, Path("/"))
    output, error = process.communicate()
    assert (process.returncode, error) == (0, "")
    assert f"in {step + 2} steps" in output


def test_metrics_on_a_full_disk_name_the_file(tmp_path, capfd):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, before[1]))
    try:
        with pytest.raises(OSError, match=r"too large: .*metrics\.jsonl'$"):
            with metrics.MetricsWriter(tmp_path, 0) as writer:
                for step in range(1_000):
                    writer.write(step, loss=1.5)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert capfd.readouterr().err == ""


def test_tensorboard_hides_what_is_written_again(tmp_path):
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


def test_what_is_ignored_stays_ignored_and_nothing_is_left_installed():
    signals = signal.SIGINT, signal.SIGTERM
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        handlers = [signal.getsignal(number) for number in signals]
        with interrupts() as received:
            os.kill(os.getpid(), signal.SIGINT)
            assert received == []
            os.kill(os.getpid(), signal.SIGTERM)
            assert received == [signal.SIGTERM]
        assert [signal.getsignal(number) for number in signals] == handlers
    finally:
        signal.signal(signal.SIGINT, before)

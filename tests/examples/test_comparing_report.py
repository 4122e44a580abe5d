"""What the report of a study says."""

import math
import pathlib
import shutil

import numpy as np
import pytest

from comparing import log, protocol, report
from comparing.protocol import Optimizer, Part, Protocol, Run

ROOT = pathlib.Path(__file__).parents[2]
PAGE = ROOT / "docs/results/study/protocol.md"
STUDY = protocol.read(PAGE)


def finished(run, loss, **about):
    row = {"loss": loss, "tokens": 100, "steps": 40, "training": [3.0, 2.4, 2.2, 2.0]}
    row |= {"unigram": 2.9, "parameters": 100, "matmul_flops_per_step": 10**9}
    return run._asdict() | row | {"state_bytes_per_parameter": 8.0} | about


def test_report_says_what_is_there_and_what_is_missing(tmp_path):
    names = ["adamw", "muon", "lion"]
    start = {"learning_rate": 1.0, "b1": 0.2}
    tune = Part("tune", "tune", "gpt2-small", 1, names, [100, 101], runs=8, repeats=2)
    judge = {"tokens_per_parameter": 20, "optimizers": names, "kind": "judge"}
    judge |= {"settings": "tune", "seeds": [0, 1, 2]}
    sizes = {"gpt2-small": 10**5, "gpt2-middle": 10**6}
    parts = [tune, *(Part(name=size, task=size, **judge) for size in sizes)]
    longer = {**judge, "tokens_per_parameter": 60}
    parts.append(Part(name="longer", task="gpt2-small", **longer))
    optimizers = {name: Optimizer("m:f", start) for name in names}
    tasks = {size: {} for size in sizes}
    study = Protocol([], tasks, optimizers, {}, {part.name: part for part in parts})
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


@pytest.mark.parametrize("name", ["weights", "iteration", "study"])
def test_committed_results_are_what_the_report_says_of_their_log(name, tmp_path):
    folder = ROOT / "docs/results" / name
    shutil.copy(folder / "runs.jsonl", tmp_path)
    page = report.write(protocol.read(folder / "protocol.md"), tmp_path)
    assert page == (folder / "results.md").read_text(encoding="utf-8")


FORMS = ["moment-after", "moment-before", "came-before"]


@pytest.fixture(name="gap")
def fixture_gap():
    """The mean difference of two optimizers on a task, and what it is called."""
    results = report.Results(STUDY, PAGE.parent)

    def gap(task, name, other):
        judged = results.judged(task)
        differences = report.gaps(judged[name], judged[other])
        word = report.verdict(differences).split()[3:]
        return differences.mean(), word[0] if word else "level"

    return gap


@pytest.mark.parametrize("task", ["gpt2-small", "bert-small"])
def test_muon_and_its_kin_lead(gap, task):
    lead = {"gpt2-small": 0.17, "bert-small": 1.4}[task]
    for leader in ("muon", "normuon", *FORMS):
        for other in ("steady-came", "nadamw", "adamw", "adafactor", "flash-adamw"):
            mean, word = gap(task, leader, other)
            assert word == "better" and mean < -lead


def test_what_is_said_of_the_smallest_gpt2_is_what_the_log_has(gap):
    """On README, the study's page and Which optimizer?"""
    task = "gpt2-small"
    words = {
        ("moment-after", "muon"): "level",
        ("moment-after", "normuon"): "better",
        ("steady-came", "adamw"): "better",
        ("nadamw", "adamw"): "better",
        ("flash-adamw", "adamw"): "better",
        ("steady-came", "nadamw"): "level",
        ("came", "adamw"): "level",
        ("adafactor", "came"): "worse",
        ("steady-came-int8", "adamw"): "better",
        ("steady-came-int8", "steady-came"): "level",
        ("came-muon-int8", "muon"): "better",
        ("came-muon-int8", "normuon"): "better",
        ("came-muon-int4", "came-muon"): "worse",
        ("came-muon-int4", "muon"): "level",
        ("adafactor", "adamw"): "worse",
    }
    for pair, word in words.items():
        assert gap(task, *pair)[1] == word, pair
    said = {
        ("came", "adamw"): 0.017,
        ("came-muon-int8", "came-muon"): -0.003,
        ("came-muon-int4", "came-muon"): 0.010,
        ("steady-came", "adamw"): -0.045,
    }
    assert {pair: round(gap(task, *pair)[0], 3) for pair in said} == said
    assert round(gap(task, "came-muon-int8", "adamw")[0], 2) == -0.24
    assert all(abs(gap(task, "moment-before", form)[0]) < 0.005 for form in FORMS)


def test_what_is_said_of_data_is_what_the_log_has():
    results = report.Results(STUDY, PAGE.parent)
    budgets = report.adamws_budgets(results)
    means = {b: report.losses(runs.values()).mean() for b, runs in budgets.items()}
    assert {b: round(means[b], 3) for b in (40, 80)} == {40: 3.132, 80: 2.970}
    judged = results.judged("gpt2-small")
    needed = []  # Between the two budgets on either side, on a line in log tokens.
    for name, low in (
        ("came-muon", 40),
        ("came-muon-int8", 40),
        ("steady-came", 20),
    ):
        gained = means[low] - report.losses(judged[name].values()).mean()
        needed.append(low / 20 * 2 ** (gained / (means[low] - means[2 * low])))
    assert [round(times, 1) for times in needed] == [2.4, 2.5, 1.2]
    law = report.data_law(budgets)
    missed = abs(law.losses() - list(means.values()))
    assert (round(min(missed), 2), round(max(missed), 2)) == (0.01, 0.06)
    tokens = next(iter(judged["adamw"].values()))["tokens"]
    assert round(law.tokens_for(means[20], 0.0)[0] / tokens, 2) == 1.12


def test_what_is_said_of_the_smallest_bert_is_what_the_log_has(gap):
    task = "bert-small"
    words = {
        ("moment-after", "muon"): "better",
        ("moment-after", "normuon"): "level",
        ("moment-before", "came-before"): "better",
        ("came-muon-int8", "muon"): "better",
        ("came-muon-int8", "normuon"): "level",
        ("came-muon-int8", "came-muon"): "level",
        ("came-muon-int4", "came-muon"): "worse",
        ("came-muon-int4", "muon"): "level",
        ("steady-came-int8", "steady-came"): "level",
        ("steady-came", "adamw"): "level",
        ("steady-came", "nadamw"): "level",
        ("nadamw", "adamw"): "level",
        ("flash-adamw", "adamw"): "worse",
        ("adafactor", "adamw"): "better",
        ("adafactor", "nadamw"): "better",
    }
    for pair, word in words.items():
        assert gap(task, *pair)[1] == word, pair
    before, came = (-gap(task, "moment-after", form)[0] for form in FORMS[1:])
    assert (round(before, 2), round(came, 2)) == (0.10, 0.14)
    assert round(gap(task, "came-muon-int4", "came-muon")[0], 2) == 0.15
    judged = report.Results(STUDY, PAGE.parent).judged(task)
    for name, runs in judged.items():
        of_muons_kin = "mu" in name or name in FORMS
        for run in runs.values():
            assert run["steps"] == 720
            assert (run["loss"] < 2.7) if of_muons_kin else (run["loss"] > 3.9)
            assert not of_muons_kin or 300 <= report.plateau(run) <= 420


def test_what_is_said_of_the_call_is_what_the_log_has():
    folder = ROOT / "docs/results/iteration"
    results = report.Results(protocol.read(folder / "protocol.md"), folder)
    words = {}
    for task in ("gpt2-small", "bert-small"):
        judged = results.judged(task)
        for name in judged.keys() - {"call"}:
            verdict = report.verdict(report.gaps(judged[name], judged["call"]))
            words[task, name] = verdict.split()[3:]
    assert words == {
        ("gpt2-small", "three-steps"): ["worse"],
        ("gpt2-small", "polar-express"): [],
        ("gpt2-small", "defaults"): ["worse"],
        ("bert-small", "three-steps"): [],
        ("bert-small", "polar-express"): [],
        ("bert-small", "defaults"): ["better"],
        ("gpt2-small", "normuon-nesterov"): ["worse"],
        ("bert-small", "normuon-nesterov-bert"): [],
    }
    studied = report.Results(STUDY, PAGE.parent)
    for task in ("gpt2-small", "bert-small"):
        same = report.gaps(
            results.judged(task)["call"], studied.judged(task)["came-muon-int8"]
        )
        assert abs(same.mean()) < 0.03


def test_came_muon_has_the_form_that_the_protocol_chooses():
    losses = report.Results(STUDY, PAGE.parent).losses
    assert STUDY.form("came-muon", losses) == "moment-after"


def test_data_law_finds_what_made_the_losses():
    tokens = np.asarray([1.0, 2.0, 4.0, 8.0, 16.0])
    losses, at_6 = 2 + 0.5 * tokens**-0.4, 2 + 0.5 * 6.0**-0.4
    exact = report.DataLaw(tokens, losses, np.zeros(5))
    assert exact.tokens_for(at_6, 0.0)[0] == pytest.approx(6.0, rel=0.01)
    assert exact.tokens_for(at_6, 0.0)[1] == pytest.approx(0, abs=1e-6)
    noisy = report.DataLaw(tokens, losses, np.full(5, 0.01))
    assert 0.1 < noisy.tokens_for(at_6, 0.01)[1] < 6
    assert exact.tokens_for(1.0, 0.0) == (math.inf, math.inf)


def test_data_law_waits_for_all_budgets(tmp_path):
    budgets = {"": 20, ", 5": 5, ", 10": 10, ", 40": 40, ", 80": 80}
    for name, budget in budgets.items():
        part = STUDY.parts[f"judge gpt2-small{name}"]
        for seed in part.seeds:
            budgets = report.adamws_budgets(report.Results(STUDY, tmp_path))
            assert report.data_law(budgets) is None, name
            assert report.budget_rows(budgets) == []
            run = Run(part.name, "adamw", {}, seed)
            row = finished(run, 2 + budget**-0.4, tokens=budget)
            log.append(tmp_path / "runs.jsonl", row)
    budgets = report.adamws_budgets(report.Results(STUDY, tmp_path))
    law = report.data_law(budgets)
    assert law.tokens_for(2 + 30**-0.4, 0.0)[0] == pytest.approx(30, rel=0.01)
    rows = report.budget_rows(budgets)
    assert [row["tokens / parameter"] for row in rows] == ["5", "10", "20", "40", "80"]
    for row in rows:
        assert row["loss"] == row["the law's"] + " ± 0.0000"


def test_plateau():
    row = finished(Run("p", "a", {}, 0), 1.0)
    assert report.plateau(row) == 30
    assert report.plateau({**row, "unigram": 2.0}) == math.inf
    assert report.losses([row, {"loss": None}]).tolist() == [1.0, math.inf]

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


@pytest.mark.parametrize("name", ["weights", "study"])
def test_committed_results_are_what_the_report_says_of_their_log(name, tmp_path):
    folder = ROOT / "docs/results" / name
    shutil.copy(folder / "runs.jsonl", tmp_path)
    page = report.write(protocol.read(folder / "protocol.md"), tmp_path)
    assert page == (folder / "results.md").read_text(encoding="utf-8")


def test_what_is_said_of_the_smallest_gpt2_is_what_the_log_has():
    """On README, the study's page and Which optimizer?"""
    judged = report.Results(STUDY, PAGE.parent).judged("gpt2-small")

    def word(name, other):
        return report.verdict(report.gaps(judged[name], judged[other])).split()[3:]

    forms = ["moment-after", "moment-before", "came-before"]
    for leader in ("muon", *forms):
        assert word(leader, "steady-came") == word(leader, "nadamw") == ["better"]
    assert all(word(form, "muon") in ([], ["better"]) for form in forms)
    assert word("steady-came", "adamw") == word("nadamw", "adamw") == ["better"]
    assert word("steady-came", "nadamw") == word("came", "adamw") == []
    assert report.gaps(judged["came"], judged["adamw"]).mean() > 0.01


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

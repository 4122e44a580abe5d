"""The comparison of optimizers: fair search, honest summaries, runs that resume."""

import dataclasses
import json
import math
import pathlib
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import compare_optimizers
from comparing import search
from comparing.figures import choose
from comparing.methods import METHODS
from comparing.runs import Log, Run
from comparing.series import Series, Settings, record_largest_update
from comparing.summary import (
    Summary,
    paired_differences,
    standard_error,
    summarize,
)
from comparing.table import make_same_rate_table, make_tables
from pretraining.data import corpus, pipeline
from pretraining.data.pipeline import Windows
from pretraining.errors import UserError
from pretraining.models import gpt2
from pretraining.task import Task
from pretraining.training import devices, step
from pretraining.training.optimizers import (
    OptimizerOptions,
    make_optimizer,
    make_schedule,
)

ROOT = pathlib.Path(__file__).parents[2]
SETTINGS = Settings(20, 8, evaluations=2, eval_batches=1, log_every=10)


@pytest.fixture(scope="module")
def task() -> Task:
    config = gpt2.GPT2Config(
        vocab_size=13, n_positions=8, n_embd=12, n_layer=1, n_head=3
    )
    tokens = (np.arange(400) ** 2 % 13).astype(np.uint16)
    return Task(
        name="mock",
        make_model=lambda rngs: gpt2.GPT2(config, rngs=rngs),
        loss_fn=gpt2.next_token_loss,
        train=Windows(tokens[:300], 8),
        validation=Windows(tokens[300:], 8),
        tokens_per_record=8,
    )


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    mesh = devices.make_mesh(devices=jax.devices()[:1])
    monkeypatch.setattr(devices, "make_mesh", lambda: mesh)
    with jax.numpy_dtype_promotion("standard"):  # For optax's own optimizers.
        yield


def search_all(loss, first: int = -10) -> dict[int, float]:
    """Searches to the end; `loss` maps an index to a loss."""
    losses: dict[int, float] = {}
    while (index := search.next_index(losses, first)) is not None:
        assert index not in losses
        losses[index] = loss(index)
    return losses


@pytest.mark.parametrize("best", [-17, -12, -10, -9, -4])
def test_search_finds_the_best_wherever_it_starts(best: int):
    losses = search_all(lambda index: 3 + 0.02 * (index - best) ** 2)
    assert search.best_index(losses) == best
    assert {best - 1, best + 1} <= losses.keys()
    # Both ends are clearly worse.
    assert min(losses[min(losses)], losses[max(losses)]) > 3 * 1.01


def test_search_passes_over_runs_that_diverged():
    losses = search_all(lambda index: math.inf if index > -14 else 3 - 0.1 * index)
    assert search.best_index(losses) == -14
    assert search.learning_rate(-14) == 3.16e-4
    assert search.index_of(3.16e-4) == -14


def test_search_ends_where_every_learning_rate_diverges():
    losses = search_all(lambda index: math.inf)
    assert min(losses) == search.LOWEST


def test_good_range_is_interpolated():
    losses = {-8: 4.0, -6: 2.02, -5: 2.0, -4: 2.01, -2: 2.21}
    low, high = search.good_range(losses)
    assert low == pytest.approx(10 ** (-6 / 4))
    assert high == pytest.approx(10 ** (-3.9 / 4))
    low, high = search.good_range({-8: 2.0, -6: math.inf})
    assert (low, high) == pytest.approx((1e-2, 1e-2))


def make_run(losses, seed: int = 0, end=None, validation=(3.0, 2.0, 1.0)) -> Run:
    rows = [{"step": 10 * k, "loss": loss} for k, loss in enumerate(losses, 1)]
    rows += [
        {"step": 10 * k, "validation_loss": loss} for k, loss in enumerate(validation)
    ]
    end = {"step": 30, "largest_update": 1.0} | (end or {})
    about = {"method": "mock", "learning_rate": 1e-3, "seed": seed}
    return Run(about, [*rows, end])


@pytest.mark.parametrize(
    ("losses", "spikes"),
    [
        ([5, 4, 3, 2], 0),
        ([5, 4, 4.1, 3], 0),
        ([5, 4, 4.3, 4.3, 3], 1),
        ([5, 4, 4.3, 4, 4.3, 3], 2),
        ([5, 4, 4.3, 4.15, 4.3], 1),
    ],
)
def test_spikes_are_rises_above_the_lowest_loss(losses, spikes: int):
    assert make_run(losses).spikes() == spikes


def test_diverged_run_has_infinite_loss_and_no_accuracy():
    run = make_run([5.0], end={"diverged": True})
    assert run.final() == math.inf
    assert run.final("validation_accuracy") == 0


def make_summary(name: str, finals) -> Summary:
    logs = [
        make_run([2.0], seed, validation=(3.0, 2.0, final))
        for seed, final in enumerate(finals)
    ]
    cost = {"state_bytes_per_parameter": 8.0}
    return Summary(name, name, logs, {1e-3: finals[0]}, (1e-3, 2e-3), cost)


def test_steps_to_a_loss_and_paired_difference():
    summary = make_summary("came", [1.0, 1.2])
    # The mean curve is 3, 2, 1.1 at steps 0, 10, 20.
    assert summary.steps_to(3.5) == 0
    assert summary.steps_to(2.5) == pytest.approx(0.25)
    assert summary.steps_to(1.1) == pytest.approx(1)
    assert math.isnan(summary.steps_to(1.0))
    mean, error = summary.minus(make_summary("adamw", [0.9, 1.0]))
    assert (mean, error) == pytest.approx((0.15, 0.05))
    # Only seeds that both have.
    mean, error = summary.minus(make_summary("adamw", [0.9]))
    assert mean == pytest.approx(0.1)
    assert math.isnan(error)


def table(summaries: list[Summary]) -> tuple[list[dict[str, str]], str]:
    """Returns the rows of the first table by column, and the second."""
    results, details = make_tables(summaries, summaries).split("\n\n")
    head, _, *lines = results.splitlines()
    columns = [column.strip() for column in head.split("|")]
    cells = [[cell.strip() for cell in line.split("|")] for line in lines]
    return [dict(zip(columns, row, strict=True)) for row in cells], details


def test_table_compares_with_the_better_adamw():
    summaries = [
        make_summary("adamw", [1.0, 1.2]),
        make_summary("adamw-b2-0.999", [0.9, 1.1]),
        make_summary("came", [0.8, 1.0]),
    ]
    rows, details = table(summaries)
    differences = [row["loss − adamw-b2-0.999's"] for row in rows]
    assert differences == ["-0.100 ± 0.000", "", "+0.100 ± 0.000"]
    assert rows[0]["validation loss"] == "0.900 ± 0.141"
    assert rows[0]["seeds"] == "2"
    assert "not searched" in details  # At the one learning rate of these runs.
    assert rows[2]["steps to AdamW's loss"] == "not reached"
    assert "| spikes |" in details and len(details.splitlines()) == 2 + len(rows)


def test_table_compares_with_steady_came_where_it_is():
    summaries = [
        make_summary("steady-came", [0.7, 0.9]),
        make_summary("adamw", [1.0, 1.3]),
    ]
    differences = [row["loss − steady-came's"] for row in table(summaries)[0]]
    assert differences == ["", "+0.350 ± 0.050"]
    # Of one seed nothing says how large the error is.
    summaries[1] = make_summary("adamw", [1.0])
    row = table(summaries)[0][1]
    assert row["loss − steady-came's"] == "+0.300"
    assert row["validation loss"] == "1.000"


def test_same_rate_table_has_seed_by_seed_differences_of_three_pairs(tmp_path):
    log = Log(tmp_path)
    finals = {
        ("steady-came", 1e-3): [1.0, 1.2, 1.1],
        ("steady-came", 1e-2): [0.5, 0.5, 0.5],
        ("adamw", 1e-3): [1.3, 1.5, 1.7],
        ("lion", 1e-3): [1.1, 1.3, 1.2, 9.0],  # A seed without a partner.
        ("muon", 1e-3): [0.1, 0.1],
        ("adamw", 1e-4): [2.0, 2.0, 2.0],
    }
    for (name, rate), losses in finals.items():
        for seed, loss in enumerate(losses):
            run = make_run([2.0], seed, validation=(3.0, loss))
            about = dict(run.about) | {"method": name, "learning_rate": rate}
            log.add(dataclasses.replace(run, about=about))
    text = make_same_rate_table(log, list(METHODS))
    rows = [[cell.strip() for cell in line.split("|")] for line in text.splitlines()]
    assert [row[1:-1] for row in rows[2:]] == [
        ["Lion", "1.0e-03", "3", "+0.100 ± 0.000"],
        ["AdamW, β2 0.95", "1.0e-03", "3", "+0.400 ± 0.100"],
    ]
    assert make_same_rate_table(log, ["muon"]) is None


@pytest.mark.parametrize(
    "name",
    [
        *("gpt2-nano", "bert-nano", "t5-nano", "fine-tuning"),
        *("gpt2-tiny-comparison", "bert-tiny-comparison"),
    ],
)
def test_committed_tables_are_what_the_logs_say(name: str):
    folder = ROOT / "docs" / "results" / name
    log = Log(folder)
    known = [summary for summary in map(partial(summarize, log), METHODS) if summary]
    tables = {
        f"{group}.md": make_tables([s for s in known if s.name in names], known)
        for group, names in compare_optimizers.GROUPS.items()
    }
    tables["same_rate.md"] = make_same_rate_table(log, list(METHODS))
    committed = {
        file.name: file.read_text(encoding="utf-8") for file in folder.glob("*.md")
    }
    assert "comparison.md" in committed
    assert ("same_rate.md" in committed) == (tables["same_rate.md"] is not None)
    assert committed == {name: tables[name] for name in committed}


def test_the_page_says_what_five_seeds_said_of_t5():
    log = Log(ROOT / "docs" / "results" / "t5-nano")
    first = [
        [run for run in log.runs(name) if run.learning_rate == 3.16e-3 and run.seed < 5]
        for name in ("nadamw-b2-0.999", "steady-came")
    ]
    differences = paired_differences(*first)
    said = f"{np.mean(differences):.3f} ± {standard_error(differences):.3f}"
    page = (ROOT / "docs" / "learning-rate.md").read_text(encoding="utf-8")
    assert f"After five seeds it\n  was ahead of NAdamW, too, by {said};" in page


def test_figure_shows_each_optimizers_best_before_others():
    losses = {
        "muon-int8": 1.0,
        "muon": 1.1,
        "steady-came": 1.2,
        "nadamw": 1.3,
        "nadamw-b2-0.999": 1.4,
        "adafactor": 1.5,
        "adafactor-b1-0": 1.6,
        "came": 1.7,
        "lion": 5.0,
    }
    summaries = [make_summary(name, [loss]) for name, loss in losses.items()]
    shown = [summary.name for summary in choose(summaries)]
    assert shown == ["muon-int8", "steady-came", "nadamw", "adafactor", "came", "lion"]
    shown = [summary.name for summary in choose(summaries[:4])]
    assert shown == ["muon-int8", "muon", "steady-came", "nadamw"]


def test_log_keeps_what_was_added(tmp_path):
    log = Log(tmp_path / "study")
    first, second = make_run([2.0, 1.5], seed=1), make_run([3.0])
    log.add(first)
    Log(tmp_path / "study").add(second)  # By another process.
    log.add_cost("mock", {"parameters": 3})
    again = Log(tmp_path / "study")
    assert again.runs("mock") == [second, first]
    assert again.find("mock", 1e-3, 1) == first
    assert again.find("mock", 1e-3, 2) is None
    assert again.runs("other") == []
    assert again.cost("mock") == {"parameters": 3}
    assert again.cost("other") is None


def test_log_drops_a_line_that_was_cut_short(tmp_path):
    first, second = make_run([2.0]), make_run([3.0], seed=1)
    log = Log(tmp_path)
    log.add(first)
    whole = log.path.read_bytes()
    log.add(second)
    log.path.write_bytes(log.path.read_bytes()[:-3])
    again = Log(tmp_path)
    assert again.runs("mock") == [first]
    again.add(second)
    assert Log(tmp_path).runs("mock") == [first, second]
    assert log.path.read_bytes().startswith(whole)


def test_what_is_not_installed_is_left_out(task: Task, tmp_path, monkeypatch, capsys):
    absent = dataclasses.replace(METHODS["came"], package="not_there")
    monkeypatch.setitem(METHODS, "came", absent)
    compare(task, tmp_path)
    assert "came: left out, needs the package not_there" in capsys.readouterr().out
    assert not (tmp_path / "runs.jsonl").exists()


def test_run_equals_plain_training(task: Task):
    """And a second learning rate, a second seed, compile nothing."""
    series = Series(task, METHODS["came-bc-clip-1"], SETTINGS)
    series.run(1e-3, 0, {})
    run = series.run(1e-2, 1, {"method": "came"})
    assert series._train_steps._cache_size() == 1
    assert run.about["options"] == {
        "optimizer": "published-came",
        "bias_correction": True,
        "update_clipping_threshold": 1.0,
    }

    options = OptimizerOptions(
        optimizer="published-came",
        learning_rate=1e-2,
        bias_correction=True,
        update_clipping_threshold=1.0,
    )
    tx = make_optimizer(options, make_schedule(options, SETTINGS.steps))
    mesh = devices.make_mesh()
    train_step = step.make_train_step(task, tx, 1, 0, mesh)
    state = step.make_init(task, tx, mesh)(1)
    batches = pipeline.train_batches(task, SETTINGS.batch_size, 1)
    losses = []
    for _ in range(SETTINGS.steps):
        state, metrics = train_step(state, devices.put_batch(next(batches), mesh))
        losses.append(float(metrics["loss"]))
    expected = np.mean(np.reshape(losses, (2, 10)), axis=1)
    assert run.curve("loss") == [
        (10, pytest.approx(expected[0], abs=1e-3)),
        (20, pytest.approx(expected[1], abs=1e-3)),
    ]
    assert [at for at, _ in run.curve("validation_loss")] == [10, 20]
    # Clipped to 1, then decayed weights are added.
    assert run.largest_update == pytest.approx(1, abs=0.05)


def test_diverged_run_ends_early(task: Task):
    run = Series(task, METHODS["lion"], SETTINGS).run(1e30, 0, {})
    assert run.final() == math.inf
    assert run.rows == [run.rows[-1]]
    assert run.rows[0]["step"] == 10


def test_adamw_in_8_bits_trains_where_it_is_installed(task: Task):
    pytest.importorskip("flashoptim_jax")
    series = Series(task, METHODS["flash-adamw"], SETTINGS)
    (_, first), (_, last) = series.run(1e-2, 0, {}).curve("loss")
    assert last < first
    assert 2 < series.cost()["state_bytes_per_parameter"] < 3


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        ("adamw", 8, 8),
        ("nadamw", 8, 8),
        ("lion", 4, 4),
        ("came", 4, 5.5),
        ("adafactor", 4, 5),
        ("adafactor-b1-0", 0, 1),
        ("steady-came", 4, 5.5),
        ("steady-came-no-confidence", 4, 5),
        ("muon", 4.1, 7.9),
        ("muon-int8", 1, 4.7),
        ("lion-int8", 1, 4.1),
    ],
)
def test_optimizers_train_and_keep_what_they_should(
    task: Task, name: str, least: float, most: float
):
    series = Series(task, METHODS[name], SETTINGS)
    (_, first), (_, last) = series.run(1e-2, 0, {}).curve("loss")
    assert last < first
    params = jax.eval_shape(lambda: nnx.state(task.make_model(nnx.Rngs(0)), nnx.Param))
    cost = series.cost()
    assert least <= cost["state_bytes_per_parameter"] <= most + 0.1
    assert cost["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(params))


def compare(task: Task, folder, *arguments: str) -> None:
    argv = ["compare_optimizers.py", "--output", str(folder), "--steps", "20"]
    argv += ["--batch-size", "8", "--seeds", "2", "--methods", "came", *arguments]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", argv)
        patch.setattr(compare_optimizers, "make_task", lambda *_: task)
        compare_optimizers.main()


def test_comparison_resumes_with_what_is_missing(task: Task, tmp_path, monkeypatch):
    compare(task, tmp_path)
    log = Log(tmp_path)
    summary = summarize(log, "came")
    assert [run.seed for run in summary.runs] == [0, 1]
    seeds = [run.seed for run in log.runs("came")]
    assert len(summary.losses) == seeds.count(0) >= 4
    assert 4 < summary.cost["state_bytes_per_parameter"] < 5.5
    table = (tmp_path / "comparison.md").read_text()
    assert "| CAME, as published |" in table
    assert (tmp_path / "comparison.png").stat().st_size > 10_000

    before = log.path.read_text().splitlines()
    (missing,) = [k for k, line in enumerate(before) if '"seed": 1' in line]
    kept = before[:missing] + before[missing + 1 :]
    log.path.write_text("".join(f"{line}\n" for line in kept))
    compare(task, tmp_path)
    *others, added = log.path.read_text().splitlines()
    assert others == kept
    before, added = json.loads(before[missing]), json.loads(added)
    # Bit for bit, but for the time taken.
    assert before["rows"].pop()["step"] == added["rows"].pop()["step"]
    assert added == before

    monkeypatch.setattr(compare_optimizers, "Series", None)  # Nothing left to train.
    compare(task, tmp_path)


def test_learning_rates_may_be_given(task: Task, tmp_path):
    rates = ["--learning-rates", "1e-3", "3.1e-3", "3.2e-3", "--methods", "lion"]
    compare(task, tmp_path, *rates)
    runs = [(run.learning_rate, run.seed) for run in Log(tmp_path).runs("lion")]
    assert sorted({rate for rate, _ in runs}) == [1e-3, 3.16e-3]
    assert len(runs) == 3  # Two seeds at the better one.
    assert "not searched" in (tmp_path / "comparison.md").read_text()


def test_pretrained_parameters_take_smaller_steps(task: Task, tmp_path, monkeypatch):
    monkeypatch.setattr(compare_optimizers.search, "next_index", once)
    pretrained = dataclasses.replace(task, pretrained=lambda params: params)
    for each, folder in (task, tmp_path / "a"), (pretrained, tmp_path / "b"):
        compare(each, folder, "--methods", "lion", "--seeds", "1")
    first, smaller = (Log(tmp_path / name).runs("lion")[0] for name in "ab")
    assert smaller.learning_rate / first.learning_rate == pytest.approx(
        0.0563, rel=0.01
    )


def once(losses: dict[int, float], first: int) -> int | None:
    return None if losses else first


def test_series_begin_with_pretrained_parameters(task: Task):
    task = dataclasses.replace(
        task, pretrained=lambda params: jax.tree.map(jnp.ones_like, params)
    )
    method = dataclasses.replace(METHODS["lion"], param_dtype="bfloat16")
    first, _ = Series(task, method, SETTINGS).run(1e-9, 0, {}).curve("loss")
    # All units of a layer are equal, and so are all logits.
    assert first[1] == pytest.approx(math.log(13), abs=2e-3)


def test_the_classifier_is_one_model_on_one_text(tmp_path, monkeypatch):
    for argument in (
        ["--size", "nano"],
        ["--vocab-size", "300"],
        ["--seq-len", "64"],
        ["--text", "mine.txt"],
    ):
        argv = ["compare_optimizers.py", "--task", "classifier", *argument]
        monkeypatch.setattr(sys, "argv", [*argv, "--output", str(tmp_path)])
        with pytest.raises(UserError, match="--task classifier: has no --size, --vo"):
            compare_optimizers.main()


def test_vocabulary_and_length_may_be_given(tmp_path):
    (tmp_path / "text.txt").write_text("One fox jumps over another. " * 100)
    options = compare_optimizers.CompareOptions(task="bert", vocab_size=40, seq_len=8)
    text = corpus.TextOptions(text=[str(tmp_path / "text.txt")])
    task = compare_optimizers.make_task(options, text)
    assert task.tokens_per_record == 8
    assert task.make_model(nnx.Rngs(0)).config.vocab_size == 40


def test_other_settings_need_another_folder(task: Task, tmp_path, monkeypatch):
    monkeypatch.setattr(compare_optimizers, "compare", lambda *_: None)
    compare(task, tmp_path)
    with pytest.raises(UserError, match="holds runs with steps 20, not 30"):
        compare(task, tmp_path, "--steps", "30")
    with pytest.raises(UserError, match="holds runs with seq_len None, not 8"):
        compare(task, tmp_path, "--seq-len", "8")
    with pytest.raises(UserError, match="--steps 25: must be a multiple of 10"):
        compare(task, tmp_path, "--steps", "25")


def test_each_task_has_its_own_length_of_a_run(task: Task, tmp_path, monkeypatch):
    monkeypatch.setattr(compare_optimizers, "compare", lambda *_: None)
    for name, eval_batches in {"gpt2": 48, "bert": 24}.items():
        compare(task, tmp_path / name, "--task", name)
        settings = json.loads((tmp_path / name / "settings.json").read_text())
        assert settings["eval_batches"] == eval_batches
        assert settings["steps"] == 20  # As given.


def test_largest_update_is_over_the_learning_rate():
    tx = record_largest_update(lambda count: 0.1 * (count + 1))
    updates = {"a": np.array([3.0, 4.0], np.float32), "b": np.float32(1.0)}
    state = tx.init(updates)
    for _ in range(2):
        passed, state = tx.update(updates, state)
        assert passed is updates
    assert state.largest_update == pytest.approx(12.5**0.5 / 0.1)
    assert state.count == 2

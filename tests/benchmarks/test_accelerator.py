"""What is measured on an accelerator works, tried at small sizes on the CPU."""

import functools
import pathlib
import subprocess
import sys
import types
from concurrent.futures import Future

import accelerator
import accelerator_page
import jax
import numpy as np
import pytest
from accelerator_page import newest, write_page
from on_accelerator import (
    largest,
    machine,
    pretraining_run,
    training_step,
    update_times,
    values,
)
from on_accelerator.recorder import Recorder, Skipped, read

from came_optax import _schedules as schedules

SCRIPT = pathlib.Path(accelerator.__file__)


@pytest.fixture(autouse=True)
def as_for_a_user():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture
def record(tmp_path):
    """Of a job at the size that only tries the code."""
    path = tmp_path / "rows.jsonl"
    return functools.partial(Recorder, path, size="nano", seconds=3600)


def test_what_fails_or_is_skipped_is_a_row_and_the_next_is_measured(record):
    job = record("update: a")
    with job.attempt(optimizer="A"):
        raise ValueError("no\nmemory")
    with job.attempt(optimizer="B"):
        raise Skipped("not installed")
    job.write(optimizer="C", ms=1.0)
    failed, skipped, measured = read(job.path)
    assert failed["failed"] == "ValueError: no memory"
    assert skipped["skipped"] == "not installed"
    assert (measured["part"], measured["ms"]) == ("update", 1.0)
    table, succeeded = accelerator.summarize(read(job.path))
    assert table.splitlines()[-1].split() == "| update | 1 | 1 | 1 |".split()
    assert not succeeded


def test_a_line_that_was_cut_short_is_left_out(record):
    job = record("values")
    job.write(passed=True)
    with job.path.open("a") as file:
        file.write('{"part": "val')
    assert [row["passed"] for row in read(job.path)] == [True]


def test_a_job_that_dies_or_hangs_costs_only_itself(record, monkeypatch):
    def run(command, env, timeout):
        name = command[command.index("--job") + 1]
        assert env["FOR_ALL"] == "1"
        if name == "hangs":
            raise subprocess.TimeoutExpired(command, timeout)
        return types.SimpleNamespace(returncode=-9 if name == "dies" else 0)

    monkeypatch.setattr(accelerator.subprocess, "run", run)
    monkeypatch.setattr(accelerator.time, "monotonic", lambda: 0.0)
    names = {"hangs": 20, "dies": 20, "works": 20, "long": 100}
    jobs = [accelerator.Job(name, "", seconds) for name, seconds in names.items()]
    path = record("").path
    accelerator.run_in_turn(jobs, path, "full", 30.0, {"FOR_ALL": "1"})
    hangs, dies, long = read(path)
    assert (hangs["job"], hangs["failed"]) == ("hangs", "ended after 20 s")
    assert (dies["job"], dies["failed"]) == ("dies", "exit code -9")
    assert (long["job"], long["skipped"]) == ("long", "30 s are left of the budget")


def test_the_script_keeps_to_its_budget(tmp_path):
    done, rows = run_script(tmp_path, "--budget-minutes=0", "--parts", "largest")
    assert [row["part"] for row in rows] == ["machine", *["largest"] * 3]
    assert all(row["skipped"] == "0 s are left of the budget" for row in rows)
    assert "| largest |        0 |      0 |       3 |" in done.stdout


def test_a_job_by_itself(tmp_path):
    _, (device, copy, matmul) = run_script(tmp_path, "--job=machine")
    assert device["device"] == "cpu"
    assert min(copy["gb_per_second"], matmul["tflops"]) > 0


def run_script(tmp_path, *options):
    path = tmp_path / "rows.jsonl"
    command = [sys.executable, SCRIPT, "--size=nano", "--output", path, *options]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return done, read(path)


def test_rows_of_two_devices_do_not_mix(record):
    path = record("machine").path
    record("machine").write(device="H100")
    accelerator.check_device(path)
    record("machine").write(device="H200")
    with pytest.raises(SystemExit, match=r"has rows of H.00 and H.00"):
        accelerator.check_device(path)


def test_what_is_done_is_left_out_when_resumed(record, tmp_path):
    names = [job.name for job in accelerator.JOBS if job.part == "largest"]
    whole, partly, failed = (record(name) for name in names)
    whole.write(layers=1)
    whole.write(layers=2, failed="one case")
    partly.write(layers=1)
    partly.write(failed="ended after 90 s")
    failed.write(failed="exit code 1")
    options = ["--budget-minutes=0", "--parts", "largest", "--resume"]
    _, rows = run_script(tmp_path, *options)
    assert [row["job"] for row in rows[5:]] == ["machine", *names[1:]]
    assert accelerator.done(rows, "full") == set()


def test_memory_and_rate_of_a_device():
    stats = {"bytes_limit": 100, "pool_bytes": 90}
    device = types.SimpleNamespace(memory_stats=lambda: stats)
    assert machine.memory_limit(device) == 90
    del stats["pool_bytes"]
    assert machine.memory_limit(device) == 100
    device = types.SimpleNamespace(device_kind="TPU v5 lite")
    assert machine.peak_tflops(device) == 197
    device = types.SimpleNamespace(device_kind="NVIDIA H200")
    assert machine.peak_tflops(device) == 989


def test_every_job_can_be_started():
    names = [job.name for job in accelerator.JOBS]
    assert len(set(names)) == len(names)
    assert accelerator.JOBS[0].name == "machine"


@pytest.mark.parametrize("form", values.FORMS)
def test_values_agree(form):
    found = values.compare(form, "int4", "float32", values.SHAPES["nano"])
    assert found["passed"]
    assert found["error"] <= values.LARGEST_ERROR


def test_a_schedule_that_is_wrong_is_seen(monkeypatch):
    def confide(u, m, s, *rest):
        delta, m, s, token = schedules.PLAIN.confide(u, m, s, *rest)
        return (
            delta,
            m,
            s._replace(row=1.001 * s.row) if hasattr(s, "row") else s,
            token,
        )

    wrong = schedules.PLAIN._replace(confide=confide)
    monkeypatch.setitem(schedules.BY_PLATFORM, "cpu", wrong)
    found = values.compare("came", "float32", "float32", values.SHAPES["nano"])
    assert not found["passed"]


@pytest.mark.parametrize("wrong", [1e-3, np.nan])
def test_values_that_are_off_are_seen(wrong):
    expected = np.random.default_rng(0).standard_normal((8, 8), np.float32)
    found = expected.copy()
    found[3, 3] += wrong
    error, _ = values.differences([found], [expected])
    assert not error <= values.LARGEST_ERROR
    codes = np.arange(100, dtype=np.int8)
    assert values.differences([codes[::-1]], [codes]) == (0.0, 1.0)


def test_rounding_and_memory():
    assert values.rounding(2**12)["passed"]
    tx = values.FORMS["came"](1e-3, mu_dtype="int8")
    found = values.memory(tx, {"kernel": jax.ShapeDtypeStruct((64, 96), np.float32)})
    assert found["passed"]
    assert found["allocated"] == found["state"]


def test_updates_are_timed_beside_adamw(record):
    job = record("update: gpt2-small float32")
    update_times.run(job, "gpt2-small", "float32")
    rows = {row["optimizer"]: row for row in read(job.path)}
    assert "skipped" in rows.pop(update_times.FLASH)
    assert set(rows) == set(update_times.NANO) - {update_times.FLASH}
    assert rows["AdamW"]["to AdamW"] == 1
    assert rows["SGD"]["bytes/parameter"] == 12
    for row in rows.values():
        rate = row["bytes/parameter"] * row["parameters"] / row["ms"] / 1e6
        assert row["GB/s"] == pytest.approx(rate, rel=1e-2)
        assert len(row["all ms"]) == update_times.ROUNDS["nano"]


def test_what_compiles_too_long_is_left_out():
    with pytest.raises(Skipped, match="not compiled in time"):
        update_times.result_of(Future(), 0.01)


def test_a_step_is_timed_and_its_batch_is_the_next_ones_too(record):
    first = record("step: AdamW")
    training_step.run(first, "AdamW")
    (row,) = read(first.path)
    rate = 1e3 * row["batch"] * row["sequence"] / row["ms"]
    assert row["tokens/s"] == pytest.approx(rate)
    assert 0 < row["share of the update"]
    assert row["loss"][1] < row["loss"][0]
    assert training_step.found_before(record("step: B")) == row["batch"]


@pytest.mark.parametrize("fits", [8, 16, 24, 88, 96])
def test_the_largest_batch_that_fits(fits):
    tried = []

    def compile_step(batch):
        tried.append(batch)
        sizes = types.SimpleNamespace(
            argument_size_in_bytes=1000,
            output_size_in_bytes=900,
            alias_size_in_bytes=900,
            temp_size_in_bytes=50 * batch + 3 * (batch > 50),  # Nearly linear.
        )
        return types.SimpleNamespace(batch=batch, memory_analysis=lambda: sizes)

    batch, compiled = training_step.largest_batch(compile_step, 1000 + 50 * fits + 4)
    assert (batch, compiled.batch) == (fits, fits)
    assert len(tried) <= 4


def test_the_largest_model_and_one_layer_more(record):
    job = record("largest: AdamW float32")
    largest.run(job, "AdamW", "float32")
    promised, more = read(job.path)
    assert promised["layers"] == largest.NANO_LAYERS
    assert more["layers"] == promised["layers"] + 1
    assert promised["compiler's figure"] <= promised["limit"]
    assert more["compiler's figure"] > more["limit"]
    assert promised["loss"][-1] < promised["loss"][0]


def test_memory_that_runs_out_is_a_result():
    def out_of_memory():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    step = types.SimpleNamespace(
        **{"config": types.SimpleNamespace(n_embd=64), "parameters": 1, "bytes": 2},
        init=out_of_memory,
    )
    found = largest.attempt(step, jax.devices()[0])
    assert found["ran"] is False
    assert found["error"].endswith("RESOURCE_EXHAUSTED: Out of memory")


def test_pretraining_is_interrupted_and_resumed(record):
    job = record("pretrain: AdamW")
    pretraining_run.run(job, ["AdamW"])
    data, run = read(job.path)
    steps, _ = pretraining_run.STEPS["nano"]
    (resumed_at,) = run["resumed_at"]
    assert steps // 2 <= resumed_at < steps
    assert run["finished"]
    assert [r["step"] for r in run["rows"] if "loss" in r] == [*range(1, steps + 1)]
    assert run["rows"][-1]["tokens"] == data["tokens"]
    assert run["validation"] < data["references"]["unigram"] + 1
    seconds = [r["seconds"] for r in run["rows"]]
    assert seconds == sorted(seconds) and seconds[-1] > 0


MEASURED = [
    {
        "job": "machine",
        "device": "H100",
        "platform": "gpu",
        "memory": 75 * 2**30,
        "packages": {"jax": "0.11.2", "optax": "0.2.8", "torch": None},
        "driver": "580.1",
        "commit": "abc",
        "time": "today",
    },
    {"job": "machine", "case": "copy", "gb_per_second": 3000.0},
    {
        "job": "values",
        "case": "came",
        "mu_dtype": "int8",
        "param_dtype": "float32",
        "error": 1e-6,
        "rounded otherwise": 0.0,
        "error of its own": 1e-6,
        "passed": True,
    },
    {
        "job": "values",
        "case": "memory",
        "mu_dtype": "int8",
        "grown": 8,
        "passed": False,
    },
    {
        "job": "update: gpt2-small float32",
        "model": "gpt2-small",
        "param_dtype": "float32",
        "optimizer": "AdamW",
        "ms": 2.0,
        "bytes/parameter": 28.0,
        "GB/s": 1500.0,
        "state": 8e6,
    },
    {
        "job": "step: AdamW",
        "optimizer": "AdamW",
        "batch": 24,
        "sequence": 1024,
        "ms": 100.0,
        "tokens/s": 245760.0,
        "utilisation": 0.3,
        "update, ms": 2.0,
        "share of the update": 0.02,
        "peak": 2**36,
        "compiler's figure": 2**36,
    },
    {
        "job": "largest: AdamW float32",
        "case": "one layer more",
        "optimizer": "AdamW",
        "param_dtype": "float32",
        "layers": 76,
        "width": 2432,
        "parameters": 5 * 10**9,
        "compiler's figure": 80 * 2**30,
        "limit": 79 * 2**30,
        "ran": False,
    },
    {
        "job": "pretrain: AdamW",
        "optimizer": "AdamW",
        "validation": 4.5,
        "state": 1e9,
        "resumed_at": [],
        "finished": True,
        "rows": [{"step": 1, "tokens": 10, "seconds": 1.0, "loss": 5.0}],
    },
    {"job": "update: other", "optimizer": "Muon", "failed": "Error: no"},
]


def test_a_page_of_what_was_measured(tmp_path):
    path = tmp_path / "h100.jsonl"
    for row in MEASURED:
        Recorder(path, row["job"]).write(**row)
    Recorder(path, "update: gpt2-small float32", size="nano").write(optimizer="nano")
    write_page(tmp_path)
    text = (tmp_path / "tables.md").read_text(encoding="utf-8")
    for part in ("Values", "Time of an update", "GPT-2 small's training step"):
        assert f"### {part}" in text
    assert "a copy moves 3,000 GB/s" in text
    assert "came, int8, parameters float32" in text
    assert "- memory, int8: grown 8: **wrong**" in text
    assert "50%" in text
    assert "out of memory" in text
    assert "- update: other (Muon): **failed**: `Error: no`" in text
    assert "nano" not in text
    for plot in ("update", "pretrain"):
        assert f"results/accelerator/h100-{plot}.svg" in text
        assert (tmp_path / f"h100-{plot}.svg").exists()


def test_what_was_measured_again_counts(tmp_path):
    job = Recorder(tmp_path / "rows.jsonl", "step: AdamW")
    job.write(failed="ended after 90 s")
    job.write(optimizer="AdamW", failed="Error: no")
    job.write(optimizer="AdamW", ms=1.0)
    (row,) = newest(read(job.path))
    assert row["ms"] == 1.0
    job.write(optimizer="CAME", failed="Error: no")
    job.write(failed="ended after 90 s")
    assert len(newest(read(job.path))) == 3


def test_the_page_is_made_of_the_files_that_are_there(tmp_path):
    for path in accelerator_page.FOLDER.glob("*.jsonl"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    write_page(tmp_path)
    tables = accelerator_page.FOLDER / "tables.md"
    made = (tmp_path / "tables.md").read_text(encoding="utf-8")
    assert made == tables.read_text(encoding="utf-8")

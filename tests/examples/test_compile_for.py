"""Training steps compiled for TPUs that aren't there."""

import textwrap

import jax
import pytest

import compile_for
from compiling import ahead_of_time, topologies
from compiling.ahead_of_time import Report, needed_and_available
from compiling.collectives import Collective, collectives
from compiling.topologies import GIB
from task import UserError
from training import sharding
from training.optimizers import OptimizerOptions, make_optimizer, make_schedule

LOOP = """\
HloModule step

%sum (x: f32[], y: f32[]) -> f32[] {
  ROOT %add = f32[] add(%x, %y)
}

%condition (i: s32[]) -> pred[] {
  %limit = s32[]{:T(128)} constant(6)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%body (i: s32[]) -> s32[] {
  %gathered = bf16[8,128]{1,0} all-gather(%part), channel_id=2, dimensions={0}
  %start = (f32[4]{0}, f32[4]{0}, u32[], u32[]) collective-permute-start(%x)
  %done = f32[4]{0} collective-permute-done(%start)
}

ENTRY %main (p: f32[4]) -> f32[4] {
  %loop = s32[] while(%zero), condition=%condition, body=%body
  %fused = f32[4]{0} fusion(%p), kind=kCustom, calls=%fused_computation
  %again = f32[4]{0} all-reduce(%p), channel_id=1, to_apply=%sum
  %pair = (f32[4]{0}, pred[3]{0}) all-reduce(%p, %q), channel_id=3, to_apply=%sum
}
"""
FUSED = """\
%fused_computation (p: f32[4]) -> f32[4] {
  ROOT %reduced = f32[4]{0} all-reduce(%p), channel_id=1, to_apply=%sum
}

"""


def test_collectives_count_loops_and_each_channel_once():
    hlo = LOOP.replace("ENTRY", FUSED + "ENTRY")
    assert collectives(hlo) == [
        Collective("all-gather", (8 * 128 * 2,), 6),
        Collective("collective-permute", (16,), 6),
        Collective("all-reduce", (16,), 1),
        Collective("all-reduce", (16, 3), 1),
    ]
    assert sum(c.bytes for c in collectives(hlo)) == 6 * 2048 + 6 * 16 + 16 + 19


def test_loops_without_a_limit_are_refused():
    hlo = LOOP.replace("ENTRY", FUSED + "ENTRY").replace("constant(6)", "parameter(0)")
    with pytest.raises(ValueError, match="cannot tell how often the loop runs"):
        collectives(hlo)
    known = 'body=%body, backend_config={"known_trip_count":{"n":"3"}}'
    assert collectives(hlo.replace("body=%body", known))[0].times == 3


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            "Sum of temporaries (26.50G) exceeds available HBM (15.75G).",
            (int(26.5 * GIB), int(15.75 * GIB)),
        ),
        (
            "Ran out of memory in memory space hbm. Used 15.75G of 15.75G hbm. "
            "Exceeded hbm capacity by 7.25M.\n\nTotal hbm usage >= 16.01G:",
            (int(15.75 * GIB + 7.25 * 2**20), int(15.75 * GIB)),
        ),
        ("Mosaic failed to compile", None),
    ],
)
def test_errors_say_how_much_memory_lacks(message, expected):
    assert needed_and_available(message) == expected


def test_report_says_what_is_used_and_whether_it_fits():
    memory = {"parameters": GIB // 2, "temporaries": 3 * GIB}
    sent = [Collective("all-reduce", (2**20, 2**19), 2)] * 3
    report = Report(10, memory, 7 * GIB // 2, 16 * GIB, sent, 61.2)
    assert report.fits
    assert str(report) == textwrap.dedent(
        """\
        memory per chip     GiB
          parameters      0.500
          temporaries     3.000
          total           3.500
          available      16.000

        collectives per step  times  MiB per chip
          all-reduce              6          9.00

        compiled in 61 s"""
    )
    report = Report(10, memory, 20 * GIB, 16 * GIB, (), 1.0)
    assert not report.fits
    assert str(report).endswith("\n\nOut of memory, by 4.00 GiB per chip")


@pytest.fixture
def compile_step():
    def compile_step(task, size, topology, slices=1, batch_size=None, **options):
        target = topologies.target(topology, slices)
        chips = len(target.devices)
        mesh = sharding.make_mesh({"fsdp": chips // slices}, target.devices)
        optimizer = OptimizerOptions(**options)
        tx = make_optimizer(optimizer, make_schedule(optimizer, 100))
        mock = compile_for.make_task(task, size, seq_len=128)
        with jax.numpy_dtype_promotion("standard"):
            return ahead_of_time.compile_train_step(
                mock, tx, target, mesh, batch_size=batch_size or chips
            )

    return compile_step


@pytest.mark.tpu
@pytest.mark.parametrize(("topology", "slices"), [("v5e:2x2", 1), ("v5e:4x4", 2)])
@pytest.mark.parametrize("task", ["gpt2", "bert", "t5"])
def test_small_models_fit(compile_step, task, topology, slices):
    report = compile_step(task, "small", topology, slices)
    assert report.fits
    chips = 4 if slices == 1 else 16  # A slice holds all parameters, in parts.
    assert report.memory["parameters"] < 1.1 * 4 * report.parameters / chips
    assert report.memory["optimizer state"] < 1.2 * report.memory["parameters"]
    gathered = sum(c.bytes for c in report.collectives if c.kind == "all-gather")
    # Once, in bfloat16; batches are much smaller.
    assert gathered < 2.5 * report.parameters


@pytest.mark.tpu
def test_too_large_a_batch_is_a_verdict(compile_step):
    report = compile_step("gpt2", "small", "v5e:2x2", batch_size=4096)
    assert not report.fits
    assert "Out of memory, by" in str(report)


@pytest.mark.tpu
@pytest.mark.parametrize("topology", ["v9:2x2", "v5e:7x9"])
def test_unknown_topologies_are_refused(compile_step, topology):
    with pytest.raises(UserError, match=f"--topology {topology}: "):
        compile_step("gpt2", "nano", topology)


def test_slices_of_gpus_are_refused():
    with pytest.raises(UserError, match=r"--slices: of TPUs only; .* h100:2x8"):
        topologies.target("h100:8", slices=2)

r"""Compile a training step for TPU slices, or H100s, that aren't there.

    pip install "came-optax[examples,tpu]"
    python examples/compile_for.py --topology v5e:4x4 --task gpt2 --size xl

says whether GPT-2 XL trains on 16 TPU v5e chips, what memory the parameters, CAME's
state and the rest take on each, and what the chips send each other.
The step is the one that pretrain_gpt2.py runs, with the same options:

    python examples/compile_for.py --topology v5e:4x4 --size xl --optimizer adamw \
        --mesh fsdp=8,tensor=2 --batch-size 64 --accumulate 4
"""

import dataclasses
from collections.abc import Mapping

from pretraining.training.interrupts import quit_on_ctrl_c

with quit_on_ctrl_c(__name__ == "__main__"):  # Imports take seconds.
    import jax.numpy as jnp

    from compiling import ahead_of_time, topologies
    from pretraining import cli, scripts
    from pretraining.options import option, positive_int
    from pretraining.task import Task, with_param_dtype
    from pretraining.training import devices
    from pretraining.training.optimizers import (
        OptimizerOptions,
        make_optimizer,
        make_schedule,
    )
    from pretraining.training.step import StepOptions


@dataclasses.dataclass(frozen=True)
class CompileOptions:
    """Options for what to compile, and what for."""

    topology: str = option(
        "v5e:4x4",
        "of a TPU slice (v4, v5e, v5p, v6e), or h100:8, or h100:2x8 for two nodes",
    )
    slices: int = option(1, "that are connected by network", type=positive_int)
    task: str = option("gpt2", "to train", choices=scripts.NAMES)
    size: str = option("small", "of the model")
    batch_size: int | None = option(
        None, "sequences per update (default: one per chip)", type=positive_int
    )
    mesh: Mapping[str, int] | None = option(
        None,
        "chips for each way to split the work (default: fsdp takes a slice, data the "
        "slices)",
        type=devices.mesh_sizes,
        metavar="AXIS=N,...",
    )


def make_task(name: str, size: str, seq_len: int | None = None) -> Task:
    """Returns the task of a pretraining script, without text, on accelerators."""
    script, model = scripts.load(name, size)
    task, _ = script.without_text(model, seq_len, jnp.bfloat16)
    return task


def main() -> None:
    options, step, optimizer = cli.parse_without_run(
        __doc__, [CompileOptions, StepOptions, OptimizerOptions]
    )
    target = topologies.target(options.topology, options.slices)
    chips = len(target.devices)
    mesh_sizes = options.mesh or {"fsdp": chips // options.slices}
    mesh = devices.make_mesh(mesh_sizes, target.devices)
    batch_size = options.batch_size or chips * step.accumulate
    devices.check_batch_size(batch_size, step.accumulate, mesh)
    task = make_task(options.task, options.size, step.seq_len)
    task = with_param_dtype(task, step.param_dtype)
    axes = ", ".join(f"{axis}={n}" for axis, n in mesh.shape.items() if n > 1)
    work = f"{batch_size} sequences of {task.tokens_per_record} tokens"
    where = f"on {target.name} ({axes})"
    print(f"{task.name}, {work}, {optimizer.optimizer}, {where}", flush=True)
    tx = make_optimizer(optimizer, make_schedule(optimizer, 1000))
    report = ahead_of_time.compile_train_step(
        task, tx, target, mesh, batch_size=batch_size, accumulate=step.accumulate
    )
    print(f"{report.parameters:,} parameters\n\n{report}")


if __name__ == "__main__":
    cli.run(main)

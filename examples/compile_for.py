r"""Compile a training step for TPU slices, or H100s, that aren't there.

    pip install -e ".[examples,tpu]"
    python examples/compile_for.py --topology v5e:4x4 --task gpt2 --size xl

says whether GPT-2 XL trains on 16 TPU v5e chips, what memory the parameters, CAME's
state and the rest take on each, and what the chips send each other.
The step is the one that pretrain_gpt2.py runs, with the same options:

    python examples/compile_for.py --topology v5e:4x4 --size xl --optimizer adamw \
        --mesh fsdp=8,tensor=2 --batch-size 64 --accumulate 4
"""

import dataclasses
import importlib
from typing import Literal

import jax.numpy as jnp

from compiling import ahead_of_time, topologies
from running import command_line
from task import Count, Task, with_param_dtype
from training import sharding
from training.optimizers import OptimizerOptions, make_optimizer, make_schedule
from training.step import StepOptions, params_sharding


@dataclasses.dataclass(frozen=True)
class CompileOptions:
    """Options for what to compile, and what for.

    Attributes:
        topology: Of a TPU slice (v4, v5e, v5p, v6e), or h100:8, or h100:2x8 for two
            nodes.
        slices: That are connected by network.
        task: To train.
        size: Of the model.
        batch_size: Sequences per update; by default one per chip.
        mesh: Chips for each way to split the work, e.g. data=2,fsdp=4; by default fsdp
            takes a slice, data the slices.
    """

    topology: str = "v5e:4x4"
    slices: Count = 1
    task: Literal["gpt2", "bert", "t5"] = "gpt2"
    size: str = "small"
    batch_size: Count | None = None
    mesh: str | None = None


def make_task(name: str, size: str, seq_len: int | None = None) -> Task:
    """Returns a task by its module's name, without text, on accelerators."""
    module = importlib.import_module(f"tasks.{name}")
    model = module.ModelOptions(size=size)
    task: Task = module.make_task(model, None, seq_len, jnp.bfloat16)
    return task


def main() -> None:
    options, step, optimizer = command_line.parse_without_run(
        __doc__, [CompileOptions, StepOptions, OptimizerOptions]
    )
    target = topologies.target(options.topology, options.slices)
    chips = len(target.devices)
    sizes = options.mesh or f"fsdp={chips // options.slices}"
    mesh = sharding.make_mesh(sharding.mesh_sizes(sizes), target.devices)
    batch_size = options.batch_size or chips * step.accumulate
    sharding.check_batch_size(batch_size, step.accumulate, mesh)
    task = make_task(options.task, options.size, step.seq_len)
    task = with_param_dtype(task, step.param_dtype)
    axes = ", ".join(f"{axis}={n}" for axis, n in mesh.shape.items() if n > 1)
    work = f"{batch_size} sequences of {task.tokens_per_record} tokens"
    where = f"on {target.name} ({axes})"
    print(f"{task.name}, {work}, {optimizer.optimizer}, {where}", flush=True)
    schedule = make_schedule(optimizer, 1000 + (optimizer.warmup or 0))
    of_params = params_sharding(task, mesh)
    tx = make_optimizer(optimizer, schedule, step.param_dtype, of_params)
    report = ahead_of_time.compile_train_step(
        task, tx, target, mesh, batch_size=batch_size, accumulate=step.accumulate
    )
    print(f"{report.parameters:,} parameters\n\n{report}")


if __name__ == "__main__":
    command_line.run(main)

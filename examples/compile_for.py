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
from typing import Any

from pretraining import cli  # First, for Ctrl-C during the others.

# isort: split
import jax
import jax.numpy as jnp

from compiling import ahead_of_time, topologies
from pretraining.data.pipeline import NO_RECORDS
from pretraining.errors import UserError
from pretraining.models import bert, gpt2, t5
from pretraining.options import option, positive_int
from pretraining.task import Task, with_param_dtype
from pretraining.training import devices
from pretraining.training.optimizers import (
    OptimizerOptions,
    make_optimizer,
    make_schedule,
)

SIZES: dict[str, dict[str, Any]] = {
    "gpt2": gpt2.SIZES,
    "bert": bert.SIZES,
    "t5": t5.SIZES,
}


@dataclasses.dataclass(frozen=True)
class CompileOptions:
    """Options for what to compile, and what for."""

    topology: str = option(
        "v5e:4x4",
        "of a TPU slice (v4, v5e, v5p, v6e), or h100:8, or h100:2x8 for two nodes",
    )
    slices: int = option(1, "that are connected by network", type=positive_int)
    task: str = option("gpt2", "to train", choices=tuple(SIZES))
    size: str = option("small", "of the model")
    batch_size: int | None = option(
        None, "sequences per update (default: one per chip)", type=positive_int
    )
    seq_len: int | None = option(
        None, "tokens per sequence (default: the model's most)", type=positive_int
    )
    accumulate: int = option(
        1, "parts that a batch is computed in, to save memory", type=positive_int
    )
    param_dtype: str = option(
        "float32",
        "that parameters are stored in; updates are rounded to it stochastically",
        choices=("float32", "bfloat16"),
    )
    mesh: Mapping[str, int] | None = option(
        None,
        "chips for each way to split the work (default: fsdp takes a slice, data the "
        "slices)",
        type=devices.mesh_sizes,
        metavar="AXIS=N,...",
    )


def make_task(
    name: str, size: str, seq_len: int | None = None
) -> tuple[Task, dict[str, jax.ShapeDtypeStruct]]:
    """Returns a task without data, and the shapes of its records."""
    if size not in SIZES[name]:
        raise UserError(f"--size {size}: known are {', '.join(SIZES[name])}")
    config: Any = dataclasses.replace(SIZES[name][size], dtype=jnp.bfloat16)
    model: Any
    loss: Any
    if name == "gpt2":
        length = seq_len or config.n_positions
        config = dataclasses.replace(config, n_positions=length)
        model, loss = gpt2.GPT2, gpt2.next_token_loss
        tokens = {"tokens": length + 1}
    elif name == "bert":
        length = seq_len or config.max_position_embeddings
        config = dataclasses.replace(config, max_position_embeddings=length)
        model, loss = bert.MaskedLM, bert.masked_token_loss
        masked = round(0.15 * length)
        tokens = {"tokens": length, "positions": masked, "targets": masked}
    else:
        length = seq_len or t5.INPUTS[size]
        model, loss = t5.T5, t5.target_token_loss
        # Published: 114 for 512. What is cut out, and sentinels in its place.
        tokens = {"inputs": length, "targets": round(114 / 512 * length)}
    record = {k: jax.ShapeDtypeStruct((n,), jnp.int32) for k, n in tokens.items()}
    record["weight"] = jax.ShapeDtypeStruct((), jnp.float32)
    task = Task(
        name=f"{name} {size}",
        make_model=lambda rngs: model(config, rngs=rngs),
        loss_fn=loss,
        train=NO_RECORDS,
        validation=NO_RECORDS,
        tokens_per_record=length,
    )
    return task, record


def main() -> None:
    options: CompileOptions
    optimizer: OptimizerOptions
    options, optimizer = cli.parse_without_run(
        __doc__, [CompileOptions, OptimizerOptions]
    )
    target = topologies.target(options.topology, options.slices)
    chips = len(target.devices)
    mesh = devices.make_mesh(
        options.mesh or {"fsdp": chips // options.slices}, target.devices
    )
    batch_size = options.batch_size or chips * options.accumulate
    devices.check_batch_size(batch_size, options.accumulate, mesh)
    task, record = make_task(options.task, options.size, options.seq_len)
    task = with_param_dtype(task, options.param_dtype)
    axes = ", ".join(f"{axis}={n}" for axis, n in mesh.shape.items() if n > 1)
    print(
        f"{task.name}, {batch_size} sequences of {task.tokens_per_record} tokens, "
        f"{optimizer.optimizer}, on {target.name} ({axes})",
        flush=True,
    )
    tx: Any = make_optimizer(optimizer, make_schedule(optimizer, 1000))
    report = ahead_of_time.compile_train_step(
        task,
        tx,
        record,
        target,
        mesh,
        batch_size=batch_size,
        accumulate=options.accumulate,
    )
    print(f"{report.parameters:,} parameters\n\n{report}")


if __name__ == "__main__":
    cli.run(main)

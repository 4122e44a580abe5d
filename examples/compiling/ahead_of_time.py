"""Training steps compiled for chips that aren't there, and what they take there."""

import collections
import dataclasses
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

from compiling.collectives import Collective, collectives
from compiling.topologies import GIB, Target
from data import pipeline
from table import format_table
from task import Task
from training import sharding
from training.step import TrainState, make_train_step, state_shapes

# What a TPU's compiler says when it gives up before and after it has placed buffers.
EXCEEDS = re.compile(
    r"temporaries \(([\d.]+[KMGT]?)\) exceeds available HBM \(([\d.]+[KMGT]?)\)"
)
EXCEEDED = re.compile(
    r"of ([\d.]+[KMGT]?) hbm\. Exceeded hbm capacity by ([\d.]+[KMGT]?)\."
)
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Report:
    """What a compiled training step takes on each chip.

    Attributes:
        parameters: Their number, in the whole model.
        memory: Bytes by kind.
        total: Bytes in all.
        available: Bytes that a chip has.
        collectives: What the chips send each other in one step.
        seconds: Time to compile.
    """

    parameters: int
    memory: Mapping[str, int]
    total: int
    available: int
    collectives: Sequence[Collective]
    seconds: float

    @property
    def fits(self) -> bool:
        """Whether the memory of the chips suffices."""
        return self.total <= self.available

    def __str__(self) -> str:
        """Returns a table."""
        memory = {**self.memory, "total": self.total, "available": self.available}
        rows = [("memory per chip", "GiB")]
        rows += [(f"  {name}", f"{size / GIB:.3f}") for name, size in memory.items()]
        tables = [format_table(rows)]
        if not self.fits:
            excess = (self.total - self.available) / GIB
            return f"{tables[0]}\n\nOut of memory, by {excess:.2f} GiB per chip"
        groups = collections.defaultdict(list)
        for collective in self.collectives:
            groups[collective.kind].append(collective)
        sent = [("collectives per step", "times", "MiB per chip")]
        for kind, group in sorted(groups.items()):
            times = sum(c.times for c in group)
            size = sum(c.bytes for c in group) / 2**20
            sent.append((f"  {kind}", f"{times:,}", f"{size:,.2f}"))
        if not groups:
            sent.append(("  none", "", ""))
        tables.append(format_table(sent))
        return "\n\n".join([*tables, f"compiled in {self.seconds:.0f} s"])


def compile_train_step(
    task: Task,
    tx: optax.GradientTransformation,
    target: Target,
    mesh: Mesh,
    *,
    batch_size: int,
    accumulate: int = 1,
) -> Report:
    """Compiles the training step that `Trainer` would run.

    Args:
        task: The model, its loss and the shapes of its records.
        tx: The optimizer.
        target: The chips.
        mesh: The mesh over them.
        batch_size: Sequences per update.
        accumulate: Parts that they are computed in.
    """
    state = state_shapes(task, tx, mesh)
    rows = NamedSharding(mesh, sharding.BATCH)
    batch = {
        name: jax.ShapeDtypeStruct((batch_size, *x.shape), x.dtype, sharding=rows)
        for name, x in pipeline.record_shapes(task).items()
    }
    step = make_train_step(task, tx, accumulate, 0, mesh)
    return compile_step(step, state, batch, target)


def compile_step(step: Any, state: TrainState, batch: Any, target: Target) -> Report:
    """Compiles a jitted training step, called with `state` and `batch`."""
    parameters = sum(p.size for p in jax.tree.leaves(state.params))
    parts = {
        "parameters": bytes_per_chip(state.params),
        "optimizer state": bytes_per_chip(state.opt_state),
    }
    began = time.perf_counter()
    try:
        compiled = step.lower(state, batch).compile()
    except jax.errors.JaxRuntimeError as error:
        needed = needed_and_available(str(error))
        if needed is None:
            raise
        total, available = needed
        parts["batch, temporaries"] = total - sum(parts.values())
        seconds = time.perf_counter() - began
        return Report(parameters, parts, total, available, (), seconds)
    seconds = time.perf_counter() - began
    sizes = compiled.memory_analysis()
    # Inputs and outputs share their buffers, as the state is donated.
    others = {
        "batch, padding": sizes.argument_size_in_bytes - sum(parts.values()),
        "outputs": sizes.output_size_in_bytes - sizes.alias_size_in_bytes,
        "temporaries": sizes.temp_size_in_bytes,
        "program": sizes.generated_code_size_in_bytes,
    }
    memory = parts | others
    return Report(
        parameters,
        memory,
        sum(memory.values()),
        target.hbm,
        collectives(compiled.as_text()),
        seconds,
    )


def needed_and_available(message: str) -> tuple[int, int] | None:
    """Returns the bytes in a TPU compiler's error, if it is that memory lacks."""

    def size(text: str) -> int:
        return int(float(text.rstrip("KMGT")) * UNITS.get(text[-1], 1))

    if found := EXCEEDS.search(message):
        # What the compiler calls temporaries there includes the arguments.
        return size(found[1]), size(found[2])
    if found := EXCEEDED.search(message):
        available = size(found[1])
        return available + size(found[2]), available
    return None


def bytes_per_chip(tree: Any) -> int:
    """Returns the bytes that each chip holds of a sharded tree."""
    return sum(
        int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )

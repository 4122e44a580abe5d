"""The whole training step of a GPT-2 small, at the largest batch that fits."""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from measuring import updates
from optimizer_share import make_task
from update import time_in_turn

from came_optax import steady_came
from on_accelerator.machine import memory_limit, peak_tflops
from on_accelerator.recorder import Recorder
from pretraining.models import gpt2
from pretraining.training import devices
from pretraining.training.step import make_init, make_train_step

OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "AdamW": functools.partial(optax.adamw, 1e-3, weight_decay=0.1),
    "steady CAME, float32": functools.partial(steady_came, 1e-3, weight_decay=0.1),
    "steady CAME, int8": functools.partial(
        steady_came, 1e-3, weight_decay=0.1, mu_dtype="int8"
    ),
}
MULTIPLE = 8  # Of sequences in a batch.
ROUNDS = {"full": 30, "nano": 3}
STEPS_AT_ONCE = 2
# Of the memory: what the allocator can't use between arrays.
FREE = 0.03


def run(record: Recorder, optimizer: str) -> None:
    """Records tokens per second and memory of the step with one optimizer."""
    size, dtype = ("nano", jnp.float32) if record.nano else ("small", jnp.bfloat16)
    task = make_task(size, dtype)
    device = jax.devices()[0]
    mesh = devices.make_mesh({}, [device])
    tx = OPTIMIZERS[optimizer]()
    train_step = make_train_step(task, tx, 1, 0, mesh)
    init = make_init(task, tx, mesh)
    length = task.tokens_per_record

    def compile_step(batch_size: int) -> Any:
        began = time.perf_counter()
        compiled = train_step.lower(
            init.eval_shape(0), make_batch(batch_size)
        ).compile()
        seconds = time.perf_counter() - began
        needed = bytes_needed(compiled)
        print(f"batch {batch_size}: {needed:,} bytes, compiled in {seconds:.0f} s")
        return compiled

    def make_batch(batch_size: int) -> dict[str, jax.Array]:
        rng = np.random.default_rng(0)
        vocabulary = gpt2.SIZES[size].vocab_size
        tokens = rng.integers(vocabulary, size=(batch_size, length + 1), dtype=np.int32)
        weight = np.ones(batch_size, np.float32)
        return devices.put_batch({"tokens": tokens, "weight": weight}, mesh)

    batch_size, compiled = found_before(record), None
    if batch_size is None:
        limit = memory_limit(device)
        batch_size, compiled = largest_batch(compile_step, limit and (1 - FREE) * limit)
    compiled = compiled or compile_step(batch_size)
    batch = make_batch(batch_size)
    state = init(0)
    losses = []

    def step() -> None:
        nonlocal state
        for _ in range(STEPS_AT_ONCE):
            state, metrics = compiled(state, batch)
        losses.append(float(metrics["loss"]))

    step()
    peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
    params, opt_state, grads = jax.tree.map(
        jnp.copy, (state.params, state.opt_state, state.params)
    )
    update_alone = updates.make_update(tx)

    def update() -> None:
        nonlocal params, opt_state
        for _ in range(STEPS_AT_ONCE):
            params, opt_state = update_alone(params, opt_state, grads)
        jax.block_until_ready(params)

    # One after the other: the copies of the second would not fit beside a step.
    seconds = time_in_turn({"step": step}, ROUNDS[record.size])["step"]
    del state
    seconds_of_update = time_in_turn({"update": update}, ROUNDS[record.size])["update"]
    per_step = statistics.median(seconds) / STEPS_AT_ONCE
    per_update = statistics.median(seconds_of_update) / STEPS_AT_ONCE
    rate = batch_size * length / per_step
    flops = flops_per_token(size) * rate
    peak_rate = peak_tflops(device)
    record.write(
        optimizer=optimizer,
        batch=batch_size,
        sequence=length,
        ms=1e3 * per_step,
        **{
            "tokens/s": rate,
            "model TFLOP/s": 1e-12 * flops,
            "utilisation": peak_rate and 1e-12 * flops / peak_rate,
            "update, ms": 1e3 * per_update,
            "share of the update": per_update / per_step,
            "peak": peak,
            "compiler's figure": bytes_needed(compiled),
            "loss": [losses[0], losses[-1]],
            "all ms": [round(1e3 * s / STEPS_AT_ONCE, 3) for s in seconds],
        },
    )


def found_before(record: Recorder) -> int | None:
    """Returns the batch that an earlier job found, so that all have the same."""
    batches = [
        r["batch"] for r in record.earlier() if r["part"] == "step" and "batch" in r
    ]
    return batches[-1] if batches else None


def largest_batch(
    compile_step: Callable[[int], Any], limit: float | None
) -> tuple[int, Any]:
    """Returns the largest batch whose step needs at most `limit` bytes, and the step.

    What a step needs grows linearly, so that two batches say what is needed by a third.
    """
    small, large = MULTIPLE, 2 * MULTIPLE
    if limit is None:
        return small, compile_step(small)
    first, second = compile_step(small), compile_step(large)
    each = (bytes_needed(second) - bytes_needed(first)) / MULTIPLE
    batch_size = int((limit - bytes_needed(first)) / each + small)
    batch_size -= batch_size % MULTIPLE
    while batch_size > large:
        compiled = compile_step(batch_size)
        if bytes_needed(compiled) <= limit:
            return batch_size, compiled
        batch_size -= MULTIPLE
    return (large, second) if bytes_needed(second) <= limit else (small, first)


def bytes_needed(compiled: Any) -> int:
    """Returns the memory that a compiled program takes while it runs."""
    sizes = compiled.memory_analysis()
    return (
        sizes.argument_size_in_bytes
        + sizes.output_size_in_bytes
        - sizes.alias_size_in_bytes
        + sizes.temp_size_in_bytes
    )


def flops_per_token(size: str) -> float:
    """Returns the operations of a training step for each token.

    Six for each weight that a token is multiplied with, and six for each product of the
    attention, of which causality needs half; as in PaLM's appendix B all are counted.
    """
    config = gpt2.SIZES[size]
    weights = 12 * config.n_layer * config.n_embd**2 + config.vocab_size * config.n_embd
    attention = 12 * config.n_layer * config.n_embd * config.n_positions
    return 6 * weights + attention

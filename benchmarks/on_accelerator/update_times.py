"""The time of one update, of many optimizers in turn, and the memory that it moves."""

import importlib.util
import os
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from measuring import updates
from measuring.compiled_steps import in_float32
from measuring.updates import plain
from update import BASELINE, ratios, time_in_turn

from came_optax import steady_came
from compiling.traffic import traffic
from on_accelerator.recorder import Recorder, Skipped

MODELS = {
    "gpt2-small": lambda nano: updates.gpt2_shapes("nano" if nano else "small"),
    "bert-large": lambda nano: updates.bert_shapes("nano" if nano else "large"),
}
ROUNDS = {"full": 30, "nano": 3}
AT_ONCE = 5  # Updates between two looks at the clock.

Make = Callable[[], optax.GradientTransformation]
OPTIMIZERS: dict[str, Make] = {
    **updates.OPTIMIZERS,
    "NAdamW": partial(optax.nadamw, 1e-3, weight_decay=0.1),
    "Muon": partial(optax.contrib.muon, 1e-3, weight_decay=0.1),
} | {
    f"steady CAME, {dtype}": partial(
        steady_came, 1e-3, weight_decay=0.1, mu_dtype=dtype
    )
    for dtype in ("float32", "int8")
}
FLASH = "FlashOptim's AdamW"
# The algorithm as it is written, without what leads a platform's compiler.
PLAIN = {f"{name}, plain": make for name, make in OPTIMIZERS.items() if "CAME" in name}
# What is measured of the large model, where compiling everything takes too long.
FEW = (
    *("SGD", "AdamW", "Adafactor, momentum", "CAME, float32", "CAME, int8"),
    *("CAME, float32, plain", "CAME, int8, plain", "steady CAME, int8", FLASH),
)
NANO = ("SGD", "AdamW", "CAME, float32", "CAME, float32, plain", FLASH)


class Contestant:
    """Repeated updates by one compiled program, which donates."""

    def __init__(self, compiled: Any, params: Any, state: Any, grads: Any):
        self.compiled, self.grads = compiled, grads
        # Not the gradients themselves: they would be donated.
        self.params, self.state = jax.tree.map(jnp.copy, params), state

    def __call__(self) -> None:
        """Makes some updates."""
        for _ in range(AT_ONCE):
            self.params, self.state = self.compiled(self.params, self.state, self.grads)
        jax.block_until_ready((self.params, self.state))


def run(record: Recorder, model: str, param_dtype: str) -> None:
    """Records times and bytes of each optimizer's update of a model."""
    dtype = jnp.dtype(param_dtype)
    shapes = MODELS[model](record.nano)
    grads = updates.random_like(shapes, dtype)
    about = {"model": model, "param_dtype": param_dtype}
    contestants = compile_all(record, about, grads)
    parameters = updates.number(grads)
    seconds = time_in_turn(contestants, ROUNDS[record.size])
    for name, contestant in contestants.items():
        update = [s / AT_ONCE for s in seconds[name]]
        moved = bytes_moved(contestant.compiled)
        row = about | {
            "optimizer": name,
            "parameters": parameters,
            "ms": 1e3 * statistics.median(update),
            "to AdamW": to_baseline(seconds, name),
            "bytes/parameter": moved and round(moved / parameters, 2),
            "GB/s": moved and 1e-9 * moved / statistics.median(update),
            "state": sum(x.nbytes for x in jax.tree.leaves(contestant.state)),
            "temporaries": contestant.compiled.memory_analysis().temp_size_in_bytes,
            "all ms": [round(1e3 * s, 4) for s in update],
        }
        record.write(**row)


def compile_all(
    record: Recorder, about: Mapping[str, str], grads: Any
) -> dict[str, Contestant]:
    """Returns what could be compiled in two thirds of the time, many at once."""
    dtype = jnp.dtype(about["param_dtype"])
    pool = ThreadPoolExecutor(max(os.cpu_count() or 2, 2) // 2)
    compiling = {}
    for name, lower in lowerings(about["model"], dtype, record.nano).items():
        with record.attempt(**about, optimizer=name):
            init, lowered = lower(grads)
            compiling[name] = init, pool.submit(lowered.compile)
    contestants = {}
    last = time.monotonic() + record.seconds_left() * 2 / 3
    for name, (init, future) in compiling.items():
        with record.attempt(**about, optimizer=name):
            compiled = result_of(future, last - time.monotonic())
            contestant = Contestant(compiled, grads, init(grads), grads)
            contestant()  # What cannot run must not take part.
            contestants[name] = contestant
    pool.shutdown(wait=False, cancel_futures=True)
    return contestants


def lowerings(model: str, dtype: Any, nano: bool) -> dict[str, Callable[[Any], Any]]:
    """Returns by name what lowers an update, given gradients, beside its `init`."""
    chosen: tuple[str, ...]
    if nano:
        chosen = NANO
    elif model == "bert-large":
        chosen = FEW
    else:
        chosen = (*OPTIMIZERS, *PLAIN, FLASH)
    found: dict[str, Callable[[Any], Any]] = {
        name: partial(lower_optax, make, dtype)
        for name, make in OPTIMIZERS.items()
        if name in chosen
    } | {
        name: partial(lower_plain, make, dtype)
        for name, make in PLAIN.items()
        if name in chosen
    }
    if FLASH in chosen:
        found[FLASH] = partial(lower_flash, dtype)
    return found


def lower_optax(make: Make, dtype: Any, grads: Any) -> tuple[Any, Any]:
    """Returns `init` and the lowered update of an Optax optimizer.

    Its state is float32 whatever the parameters are, except CAME's momentum.
    """
    tx = make() if dtype == jnp.float32 else in_float32(make())
    state = jax.eval_shape(tx.init, grads)
    return tx.init, updates.make_update(tx).lower(grads, state, grads)


def lower_plain(make: Make, dtype: Any, grads: Any) -> tuple[Any, Any]:
    """Returns the same, without the schedule of any platform."""
    with plain():
        return lower_optax(make, dtype, grads)


def lower_flash(dtype: Any, grads: Any) -> tuple[Any, Any]:
    """Returns `init` and the lowered update of FlashOptim's AdamW in 8 bits.

    Parameters in bfloat16 have another 8 bits, as by its defaults.
    """
    if importlib.util.find_spec("flashoptim_jax") is None:
        raise Skipped("flashoptim-jax is not installed")
    if jax.default_backend() != "gpu":
        raise Skipped("flashoptim-jax is for GPUs")
    import flashoptim_jax

    bits = None if dtype == jnp.float32 else 24
    tx = flashoptim_jax.flash_adamw(1e-3, weight_decay=0.1, master_weight_bits=bits)

    def update(params: Any, state: Any, grads: Any) -> Any:
        return tx.step(params, state, grads)

    state = jax.eval_shape(tx.init, grads)
    jitted = jax.jit(update, donate_argnums=(0, 1))
    return tx.init, jitted.lower(grads, state, grads)


def result_of(future: Future[Any], seconds: float) -> Any:
    """Returns a compiled program, unless compiling it takes too long."""
    try:
        return future.result(timeout=max(seconds, 0))
    except TimeoutError:
        raise Skipped("not compiled in time") from None


def bytes_moved(compiled: Any) -> int | None:
    """Returns the bytes that kernels read and write, or None where a program loops."""
    try:
        return traffic(compiled.as_text()).hbm_bytes
    except ValueError:
        return None


def to_baseline(seconds: Mapping[str, list[float]], name: str) -> float | None:
    """Returns what an optimizer took of AdamW's time, the median of rounds."""
    if BASELINE not in seconds:
        return None
    return statistics.median(ratios(seconds, name))

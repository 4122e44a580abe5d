"""The largest model that the compiler promises trains, and one layer more.

The models, and the search, are those of `largest_model.py`; here they are then trained.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from largest_model import config_of, largest, layers_of, make_task
from measuring.compiled_steps import in_float32

from came_optax import steady_came
from on_accelerator.machine import memory_limit
from on_accelerator.recorder import Recorder, Skipped, describe
from on_accelerator.training_step import bytes_needed
from pretraining.task import Task, with_param_dtype
from pretraining.training import devices
from pretraining.training.step import TrainState, make_train_step, state_shapes

OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "AdamW": functools.partial(optax.adamw, 1e-4, weight_decay=0.1),
    "steady CAME, int8": functools.partial(
        steady_came, 1e-4, weight_decay=0.1, mu_dtype="int8"
    ),
}
# Of a step for each parameter, in programs for an H100: where the search begins.
BYTES_PER_PARAMETER = {
    ("AdamW", "float32"): 16.14,
    ("AdamW", "bfloat16"): 14.19,
    ("steady CAME, int8", "bfloat16"): 8.28,
}
STEPS = 3
NANO_LAYERS = 4
MOST_SMALLER = 3  # Layers fewer that are tried if what was promised fails.
SECONDS_FOR_ANOTHER = 25


def run(record: Recorder, optimizer: str, param_dtype: str) -> None:
    """Records some steps of the largest model, and what one layer more does."""
    device = jax.devices()[0]
    make = functools.partial(
        Step, in_float32(OPTIMIZERS[optimizer]()), param_dtype, record.nano
    )
    steps: dict[int, Step] = {}

    def step_of(layers: int) -> Step:
        if layers not in steps:
            steps[layers] = make(layers)
        return steps[layers]

    if record.nano:
        limit, guess = step_of(NANO_LAYERS).bytes, NANO_LAYERS
    else:
        known = memory_limit(device)
        if known is None:
            raise Skipped("JAX tells no limit of this device's memory")
        limit, each = known, BYTES_PER_PARAMETER[optimizer, param_dtype]
        guess = layers_of(limit / each)

    def measure(layers: int) -> dict[str, Any]:
        needed = step_of(layers).bytes
        return {"bytes": needed, "fits": needed <= limit}

    promised = largest(measure, guess, limit)
    about = {"optimizer": optimizer, "param_dtype": param_dtype, "limit": limit}
    for layers in range(promised, promised - MOST_SMALLER, -1):
        tried = attempt(step_of(layers), device)
        record.write(case="promised", layers=layers, **about, **tried)
        if tried["ran"] or record.seconds_left() < SECONDS_FOR_ANOTHER:
            break
    tried = attempt(step_of(promised + 1), device)
    record.write(case="one layer more", layers=promised + 1, **about, **tried)


class Step:
    """The compiled training step of a model, on one sequence."""

    def __init__(
        self, tx: optax.GradientTransformation, dtype: str, nano: bool, layers: int
    ):
        config = config_of(layers)
        if nano:
            config = dataclasses.replace(
                config, vocab_size=512, n_positions=64, dtype=jnp.float32
            )
        self.config, self.tx = config, tx
        self.task: Task = with_param_dtype(make_task(config), dtype)
        self.mesh = devices.make_mesh({}, jax.devices()[:1])
        self.shapes = state_shapes(self.task, tx, self.mesh)
        step = make_train_step(self.task, tx, 1, 0, self.mesh)
        began = time.perf_counter()
        self.compiled = step.lower(self.shapes, self.batch()).compile()
        self.bytes = bytes_needed(self.compiled)
        seconds = time.perf_counter() - began
        print(f"{layers} layers: {self.bytes:,} bytes, compiled in {seconds:.0f} s")

    @property
    def parameters(self) -> int:
        """The number of parameters."""
        return sum(p.size for p in jax.tree.leaves(self.shapes.params))

    def batch(self) -> dict[str, jax.Array]:
        """Returns a sequence of random tokens."""
        shape = (1, self.config.n_positions + 1)
        tokens = np.random.default_rng(0).integers(self.config.vocab_size, size=shape)
        batch = {"tokens": tokens.astype(np.int32), "weight": np.ones(1, np.float32)}
        return devices.put_batch(batch, self.mesh)

    def init(self) -> TrainState:
        """Returns a first state whose making takes no memory beside it.

        Random numbers would: theirs is not what a run's peak is meant to show.
        """

        def fill(path: Any, leaf: Any) -> jax.Array:
            if "scale" in jax.tree_util.keystr(path):
                return jnp.ones(leaf.shape, leaf.dtype)
            places = [
                jax.lax.broadcasted_iota(jnp.float32, leaf.shape, axis) * (axis + 1.7)
                for axis in range(len(leaf.shape))
            ]
            return (0.02 * jnp.sin(sum(places))).astype(leaf.dtype)

        def init() -> TrainState:
            params = jax.tree_util.tree_map_with_path(fill, self.shapes.params)
            return TrainState(jnp.zeros((), jnp.int32), params, self.tx.init(params))

        shardings = jax.tree.map(lambda x: x.sharding, self.shapes)
        return jax.jit(init, out_shardings=shardings)()


def attempt(step: Step, device: jax.Device) -> dict[str, Any]:
    """Takes some steps; returns the losses and the peak, or how memory ran out."""
    found: dict[str, Any] = {
        "width": step.config.n_embd,
        "parameters": step.parameters,
        "compiler's figure": step.bytes,
    }
    losses = []
    try:
        state, batch = step.init(), step.batch()
        for _ in range(STEPS):
            state, metrics = step.compiled(state, batch)
            losses.append(float(metrics["loss"]))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return found | {"ran": False, "error": describe(error)}
    peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
    return found | {"ran": True, "peak": peak, "loss": losses}

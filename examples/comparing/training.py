"""One run: from its seed, or from where it was interrupted, to its final loss."""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from comparing.protocol import Settings, make_schedule
from comparing.tasks import Splits
from pretraining.data import pipeline
from pretraining.files import replacing
from pretraining.training import devices
from pretraining.training.step import (
    TrainState,
    make_evaluate,
    make_init,
    make_train_step,
    state_shapes,
)

CLIP = 1.0  # Largest norm of a gradient, for all.
CHUNK = 10  # Steps a call: a small model's are too short to be dispatched singly.
SAVE = 180.0  # Seconds between two checkpoints.


class WithSettingsState(NamedTuple):
    """State of `with_settings`."""

    settings: dict[str, Any]
    inner: Any


def with_settings(
    make: Callable[..., optax.GradientTransformation], settings: Mapping[str, Any]
) -> optax.GradientTransformation:
    """Keeps settings in the state: others are no reason to compile anew."""

    def init(params: Any) -> WithSettingsState:
        arrays = {name: jnp.float32(value) for name, value in settings.items()}
        return WithSettingsState(arrays, make(**arrays).init(params))

    def update(updates: Any, state: WithSettingsState, params: Any = None) -> Any:
        updates, inner = make(**state.settings).update(updates, state.inner, params)
        return updates, WithSettingsState(state.settings, inner)

    return optax.GradientTransformation(init, update)


class Series:
    """Runs of one optimizer on one task, of any settings, seed and length."""

    def __init__(
        self,
        splits: Splits,
        batch_size: int,
        make: Callable[..., optax.GradientTransformation],
        names: Settings,
    ):
        self.splits, self.task, self.batch_size = splits, splits.task, batch_size
        self.mesh = devices.make_mesh(devices=jax.devices()[:1])

        def scheduled(learning_rate: Any, warmup: Any, steps: Any, **settings: Any):
            schedule = make_schedule(learning_rate, warmup, steps)
            return optax.chain(
                optax.clip_by_global_norm(CLIP), make(schedule, **settings)
            )

        tx = with_settings(scheduled, {name: 0.5 for name in [*names, "steps"]})
        self._init = make_init(self.task, tx, self.mesh)
        step = make_train_step(self.task, tx, 1, 0, self.mesh)
        self._steps = jax.jit(
            lambda state, batches: jax.lax.scan(step, state, batches),
            donate_argnums=0,
            out_shardings=devices.replicated(self.mesh),
        )
        self._evaluate = make_evaluate(self.task, self.mesh)
        shapes = state_shapes(self.task, tx, self.mesh)
        parameters = sum(p.size for p in jax.tree.leaves(shapes.params))
        state = jax.tree.leaves(shapes.opt_state.inner)
        state_bytes = sum(x.size * x.dtype.itemsize for x in state)
        batch = next(pipeline.validation_batches(self.task, batch_size, 1))
        self.about = {
            "parameters": parameters,
            "state_bytes_per_parameter": round(state_bytes / parameters, 3),
            "unigram": unigram(self.task.validation.arrays[0]),
            "matmul_flops_per_step": matmul_flops(step, shapes, batch),
        }

    def steps(self, tokens_per_parameter: float) -> int:
        """Returns how many steps make a budget, a multiple of `CHUNK`."""
        tokens = tokens_per_parameter * self.about["parameters"]
        step = self.batch_size * self.task.tokens_per_record
        return round(tokens / step / CHUNK) * CHUNK

    def run(
        self,
        settings: Settings,
        seed: int,
        steps: int,
        evaluations: int,
        *,
        tuning: bool,
        path: Path,
    ) -> dict[str, Any]:
        """Trains, and returns what the log tells of it.

        Args:
            settings: The optimizer's.
            seed: Of the weights and the order of the data.
            steps: How many.
            evaluations: How many, the last at the end.
            tuning: Whether to evaluate on the text for that.
            path: Where to save the state every few minutes, and to go on from.
        """
        records = self.splits.tuning if tuning else self.task.validation
        batches = pipeline.train_batches(self.task, self.batch_size, seed)
        state = self._init(seed)
        values = {**settings, "steps": steps}
        arrays = {
            name: jax.device_put(np.float32(value), devices.replicated(self.mesh))
            for name, value in values.items()
        }
        state = state._replace(opt_state=state.opt_state._replace(settings=arrays))
        log: dict[str, Any] = {"training": [], "evaluations": [], "seconds": 0.0}
        if path.exists():
            state, log, position = load(path, state)
            batches.set_state(position)
        first, began, saved = log["seconds"], time.perf_counter(), time.perf_counter()
        last: float | None = None
        start = int(state.step)
        for step in range(start + CHUNK, steps + 1, CHUNK):
            state, metrics = self._steps(state, self._stack(batches))
            loss = float(jnp.mean(metrics["loss"]))
            log["training"].append(round(loss, 4))
            if not math.isfinite(loss):
                break
            due = step * evaluations // steps > (step - CHUNK) * evaluations // steps
            if due:
                held_out = pipeline.validation_batches(
                    self.task, self.batch_size, records=records
                )
                last = self._evaluate(state.params, held_out)["loss"]
                log["evaluations"].append([step, round(last, 5)])
            log["seconds"] = round(first + time.perf_counter() - began, 1)
            if time.perf_counter() - saved > SAVE:
                save(path, state, log, batches.get_state())
                saved = time.perf_counter()
        finished = last is not None and math.isfinite(last) and step == steps
        return {
            "loss": round(last, 5) if finished and last is not None else None,
            "steps": steps,
            "tokens": steps * self.batch_size * self.task.tokens_per_record,
            **self.about,
            **log,
        }

    def _stack(self, batches: Iterator[Any]) -> Any:
        taken = [next(batches) for _ in range(CHUNK)]
        stacked = jax.tree.map(lambda *arrays: np.stack(arrays), *taken)
        return devices.put_batch(stacked, self.mesh, axis=1)


def unigram(tokens: np.ndarray) -> float:
    """Returns the cross-entropy of a model that knows how frequent each token is."""
    counts = np.bincount(tokens)
    part = counts[counts > 0] / len(tokens)
    return round(float(-np.sum(part * np.log(part))), 4)


def save(path: Path, state: TrainState, log: dict[str, Any], position: Any) -> None:
    """Writes a run's state, whole or not at all."""
    leaves = [np.asarray(x) for x in jax.tree.leaves(state)]
    # Of types that numpy has not itself, the bytes.
    arrays = {
        str(k): np.frombuffer(x.tobytes(), np.uint8) for k, x in enumerate(leaves)
    }
    about = json.dumps([log, position])
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, about=about, **arrays)


def load(path: Path, like: TrainState) -> tuple[TrainState, dict[str, Any], Any]:
    """Returns state, log and the position in the data that `save` was given."""
    with np.load(path) as arrays:
        log, position = json.loads(str(arrays["about"]))
        leaves, structure = jax.tree.flatten(like)
        restored = [
            jax.device_put(
                np.frombuffer(arrays[str(k)].tobytes(), x.dtype).reshape(x.shape),
                x.sharding,
            )
            for k, x in enumerate(leaves)
        ]
    return jax.tree.unflatten(structure, restored), log, position


def matmul_flops(function: Callable[..., Any], *args: Any) -> int:
    """Counts two for each multiplication and addition of all matrix products."""
    return _flops(jax.make_jaxpr(function)(*args).jaxpr)


def _flops(jaxpr: Any) -> int:
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += (
                2
                * equation.outvars[0].aval.size
                * math.prod(shape[k] for k in contracted)
            )
        inner = [
            _flops(getattr(x, "jaxpr", x))
            for value in equation.params.values()
            for x in (value if isinstance(value, (tuple, list)) else [value])
            if hasattr(getattr(x, "jaxpr", x), "eqns")
        ]
        choose = max if equation.primitive.name == "cond" else sum
        total += equation.params.get("length", 1) * (choose(inner) if inner else 0)
    return total

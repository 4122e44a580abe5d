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

from comparing.log import replacing
from comparing.protocol import Settings, make_schedule
from comparing.tasks import Splits
from data import pipeline
from task import UserError
from training import sharding
from training.step import (
    TrainState,
    make_evaluate,
    make_init,
    make_train_step,
    state_shapes,
)

CLIP = 1.0  # Largest norm of a gradient, for all.
CHUNK = 10  # Steps a call: a small model's are too short to be dispatched singly.
SAVE = 180.0  # Seconds between two checkpoints.

Make = Callable[..., optax.GradientTransformation]


class WithSettingsState(NamedTuple):
    """State of `with_settings`."""

    settings: dict[str, Any]
    inner: Any


def with_settings(make: Make, settings: Settings) -> optax.GradientTransformation:
    """Keeps settings in the state: others are no reason to compile anew."""

    def init(params: Any) -> WithSettingsState:
        arrays = {name: jnp.float32(value) for name, value in settings.items()}
        return WithSettingsState(arrays, make(**arrays).init(params))

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        updates, inner = make(**state.settings).update(updates, state.inner, params)
        return updates, WithSettingsState(state.settings, inner)

    return optax.GradientTransformation(init, update)


class Series:
    """Runs of one optimizer on one task, of any settings, seed and length.

    Attributes:
        about: What the log tells of all of them.
    """

    def __init__(self, splits: Splits, batch_size: int, make: Make, start: Settings):
        self.splits, self.task, self.batch_size = splits, splits.task, batch_size
        self.mesh = sharding.make_mesh(devices=jax.devices()[:1])

        def clipped(learning_rate: Any, warmup: Any, steps: Any, **settings: Any):
            schedule = make_schedule(learning_rate, warmup, steps)
            clip = optax.clip_by_global_norm(CLIP)
            return optax.chain(clip, make(schedule, **settings))

        tx = with_settings(clipped, {**start, "steps": 100})
        self._init = make_init(self.task, tx, self.mesh)
        step = make_train_step(self.task, tx, 1, 0, self.mesh)
        self._steps = jax.jit(
            lambda state, batches: jax.lax.scan(step, state, batches),
            donate_argnums=0,
            out_shardings=sharding.replicated(self.mesh),
        )
        self._evaluate = make_evaluate(self.task, self.mesh)
        shapes = state_shapes(self.task, tx, self.mesh)
        opt_state: Any = shapes.opt_state
        arrays = jax.tree.leaves(opt_state.inner)
        parameters = sum(p.size for p in jax.tree.leaves(shapes.params))
        state_bytes = sum(x.size * x.dtype.itemsize for x in arrays)
        batch = next(pipeline.validation_batches(self.task, batch_size, 1))
        self.about = {
            "parameters": parameters,
            "state_bytes_per_parameter": round(state_bytes / parameters, 3),
            "unigram": unigram(self.task.validation.arrays[0]),
            "matmul_flops_per_step": matmul_flops(jax.make_jaxpr(step)(shapes, batch)),
        }

    def steps(self, tokens_per_parameter: float) -> int:
        """Returns how many steps make a budget, a multiple of `CHUNK`."""
        tokens = tokens_per_parameter * self.about["parameters"]
        step = self.batch_size * self.task.tokens_per_record
        if not (steps := round(tokens / step / CHUNK) * CHUNK):
            raise UserError(
                f"{tokens_per_parameter:g} tokens a parameter of {self.task.name} are "
                f"{tokens / step:.1f} steps; at least {CHUNK} are needed"
            )
        return steps

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
        state = self._first(settings, seed, steps)
        log: dict[str, Any] = {"training": [], "evaluations": [], "seconds": 0.0}
        if path.exists():
            state, log, position = load(path, state)
            batches.set_state(position)
        before, began = log["seconds"], time.perf_counter()
        saved, final = began, None
        for step in range(int(state.step) + CHUNK, steps + 1, CHUNK):
            state, metrics = self._steps(state, self._stack(batches))
            loss = float(jnp.mean(metrics["loss"]))
            log["training"].append(round(loss, 4))
            if not math.isfinite(loss):
                break
            if step * evaluations // steps > (step - CHUNK) * evaluations // steps:
                held_out = pipeline.validation_batches(
                    self.task, self.batch_size, records=records
                )
                loss = round(self._evaluate(state.params, held_out)["loss"], 5)
                log["evaluations"].append([step, loss])
                final = loss if step == steps and math.isfinite(loss) else None
            log["seconds"] = round(before + time.perf_counter() - began, 1)
            if time.perf_counter() - saved > SAVE:
                save(path, state, log, batches.get_state())
                saved = time.perf_counter()
        tokens = steps * self.batch_size * self.task.tokens_per_record
        return {"loss": final, "steps": steps, "tokens": tokens, **self.about, **log}

    def timer(self, settings: Settings) -> Callable[[], float]:
        """Returns a function that makes steps and returns the seconds of one."""
        batches = pipeline.train_batches(self.task, self.batch_size, 0)
        state, stacked = self._first(settings, 0, 10_000), self._stack(batches)

        def step() -> float:
            nonlocal state
            began = time.perf_counter()
            state, metrics = self._steps(state, stacked)
            jax.block_until_ready((state, metrics))
            return (time.perf_counter() - began) / CHUNK

        return step

    def _first(self, settings: Settings, seed: int, steps: int) -> TrainState:
        state = self._init(seed)
        opt_state: Any = state.opt_state
        everywhere = sharding.replicated(self.mesh)
        arrays = {
            name: jax.device_put(np.float32(value), everywhere)
            for name, value in {**settings, "steps": steps}.items()
        }
        return state._replace(opt_state=opt_state._replace(settings=arrays))

    def _stack(self, batches: Iterator[Any]) -> Any:
        taken = [next(batches) for _ in range(CHUNK)]
        stacked = jax.tree.map(lambda *arrays: np.stack(arrays), *taken)
        return sharding.put_batch(stacked, self.mesh, axis=1)


def unigram(tokens: np.ndarray) -> float:
    """Returns the cross-entropy of a model that knows how frequent each token is."""
    counts = np.bincount(tokens)
    part = counts[counts > 0] / len(tokens)
    return round(float(-np.sum(part * np.log(part))), 4)


def save(path: Path, state: TrainState, log: Mapping[str, Any], position: Any) -> None:
    """Writes a run's state, whole or not at all."""
    # Of types that numpy has not itself, the bytes.
    arrays = [
        np.frombuffer(np.asarray(x).tobytes(), "u1") for x in jax.tree.leaves(state)
    ]
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, *arrays, about=json.dumps([log, position]))


def load(path: Path, like: TrainState) -> tuple[TrainState, dict[str, Any], Any]:
    """Returns state, log and the position in the data that `save` was given."""
    leaves, structure = jax.tree.flatten(like)
    with np.load(path) as arrays:
        log, position = json.loads(str(arrays["about"]))
        for k, x in enumerate(leaves):
            array = np.frombuffer(arrays[f"arr_{k}"].tobytes(), x.dtype)
            leaves[k] = jax.device_put(array.reshape(x.shape), x.sharding)
    return jax.tree.unflatten(structure, leaves), log, position


def matmul_flops(jaxpr: Any) -> int:
    """Counts two for each multiplication and addition of all matrix products."""
    total = 0
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        params = equation.params
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            products = math.prod(shape[k] for k in contracted)
            total += 2 * equation.outvars[0].aval.size * products
        inner = [params[k] for k in ("jaxpr", "call_jaxpr", "fun_jaxpr") if k in params]
        branches = [matmul_flops(branch) for branch in params.get("branches", ())]
        inside = sum(map(matmul_flops, inner)) + max(branches, default=0)
        total += params.get("length", 1) * inside
    return total

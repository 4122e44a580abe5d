"""Runs of one optimizer: learning rates and seeds share one compilation."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from came_optax import state_memory
from comparing.methods import Method
from comparing.runs import Run
from pretraining.data import pipeline
from pretraining.task import Task, with_param_dtype
from pretraining.training import devices
from pretraining.training.optimizers import OptimizerOptions, make_schedule
from pretraining.training.step import (
    first_state,
    make_evaluate,
    make_init,
    make_train_step,
    state_shapes,
    state_shardings,
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all runs of a comparison have in common."""

    steps: int
    batch_size: int
    evaluations: int
    eval_batches: int
    log_every: int


class Series:
    """Runs of one method on one task, at any learning rate and seed."""

    def __init__(self, task: Task, method: Method, settings: Settings):
        task = with_param_dtype(task, method.param_dtype)
        self.task, self.method, self.settings = task, method, settings
        self.mesh = devices.make_mesh()
        warmup = round(method.warmup * settings.steps)
        self.options = dataclasses.replace(
            method.options, learning_rate=1.0, warmup=warmup
        )
        shape = make_schedule(self.options, settings.steps)

        def scaled(peak: jax.Array) -> optax.GradientTransformation:
            def schedule(count: Any) -> Any:
                return peak * shape(count)

            update_rule = method.make(self.options, schedule)
            return optax.chain(update_rule, record_largest_update(schedule))

        # In the state, so that another learning rate is no reason to compile anew.
        tx = optax.inject_hyperparams(scaled)(peak=1.0)
        self._init = make_init(task, tx, self.mesh)
        train_step = make_train_step(task, tx, 1, 0, self.mesh)
        # Many steps a call: a nano model's step is too short to be dispatched singly.
        self._train_steps = jax.jit(
            lambda state, batches: jax.lax.scan(train_step, state, batches),
            donate_argnums=0,
            out_shardings=(
                state_shardings(task, tx, self.mesh),
                devices.replicated(self.mesh),
            ),
        )
        self._evaluate = make_evaluate(task, self.mesh)

    def run(self, learning_rate: float, seed: int, about: dict[str, Any]) -> Run:
        """Trains from the start; the seed chooses weights and the order of the data.

        Args:
            learning_rate: The peak.
            seed: Of the weights and the data.
            about: More for the log's first line.
        """
        settings, began = self.settings, time.perf_counter()
        about = about | {
            "learning_rate": learning_rate,
            "seed": seed,
            "options": _given(self.method.options),
            "param_dtype": self.method.param_dtype,
            "warmup": self.options.warmup,
        }
        rows: list[dict[str, Any]] = []
        batches = pipeline.train_batches(self.task, settings.batch_size, seed)
        state = first_state(self.task, self._init, seed)
        peak = jax.device_put(np.float32(learning_rate), devices.replicated(self.mesh))
        state = state._replace(opt_state=optax.tree.set(state.opt_state, peak=peak))
        evaluated, diverged = 0, False
        for step in range(settings.log_every, settings.steps + 1, settings.log_every):
            state, metrics = self._train_steps(state, self._stack(batches))
            loss = float(jnp.mean(metrics["loss"]))
            if not math.isfinite(loss):
                diverged = True
                break
            rows.append({"step": step, "loss": round(loss, 4)})
            if step * settings.evaluations // settings.steps > evaluated:
                evaluated += 1
                held_out = pipeline.validation_batches(
                    self.task, settings.batch_size, settings.eval_batches
                )
                means = self._evaluate(state.params, held_out)
                values = {f"validation_{k}": round(v, 5) for k, v in means.items()}
                rows.append({"step": step} | values)
        end = {"step": step, "seconds": round(time.perf_counter() - began, 1)}
        if diverged:
            end["diverged"] = True
        else:
            largest = float(optax.tree.get(state.opt_state, "largest_update"))
            end["largest_update"] = round(largest, 4)
        return Run(about, [*rows, end])

    def cost(self) -> dict[str, float]:
        """Returns the model's parameters and the optimizer's state for each of them."""
        schedule = make_schedule(self.options, self.settings.steps)
        tx = self.method.make(self.options, schedule)
        memory = state_memory(tx, state_shapes(self.task, tx, self.mesh).params)
        return {
            "parameters": memory.num_params,
            "state_bytes_per_parameter": memory.bytes_per_param,
        }

    def _stack(self, batches: Iterator[Any]) -> Any:
        taken = [next(batches) for _ in range(self.settings.log_every)]
        stacked = jax.tree.map(lambda *arrays: np.stack(arrays), *taken)
        return devices.put_batch(stacked, self.mesh, axis=1)


class LargestUpdateState(NamedTuple):
    """State of `record_largest_update`.

    Attributes:
        count: Updates so far.
        largest_update: The largest RMS of a leaf's update over the learning rate.
    """

    count: Any  # A tuple's method for mypy.
    largest_update: jax.Array


def record_largest_update(
    schedule: Callable[[Any], Any],
) -> optax.GradientTransformation:
    """Passes updates through and keeps the largest RMS / learning rate seen."""

    def init(params: Any) -> LargestUpdateState:
        del params
        return LargestUpdateState(jnp.zeros((), jnp.int32), jnp.zeros(()))

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        del params
        rms = [jnp.sqrt(jnp.mean(jnp.square(u))) for u in jax.tree.leaves(updates)]
        largest = jnp.max(jnp.stack(rms)) / schedule(state.count)
        return updates, LargestUpdateState(
            state.count + 1, jnp.maximum(state.largest_update, largest)
        )

    return optax.GradientTransformation(init, update)


def _given(options: OptimizerOptions) -> dict[str, Any]:
    """Returns the options that differ from their defaults, and the optimizer."""
    values = dataclasses.asdict(options)
    return {"optimizer": options.optimizer} | {
        field.name: values[field.name]
        for field in dataclasses.fields(options)
        if values[field.name] != field.default
        and field.name not in ("learning_rate", "warmup")
    }

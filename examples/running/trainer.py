"""The training loop that all examples share."""

import contextlib
import dataclasses
import json
import math
import sys
import time
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from came_optax import state_memory
from data import pipeline
from running import metrics
from running.command_line import as_config, interrupts
from running.folder import Checkpoints, OtherState
from task import Count, Records, Task, UserError, Whole, with_param_dtype
from training import sharding
from training.optimizers import OptimizerOptions, make_optimizer, make_schedule
from training.step import (
    StepOptions,
    TrainState,
    first_state,
    make_evaluate,
    make_init,
    make_train_step,
    merge,
    params_sharding,
    state_shapes,
)


class Diverged(UserError):
    """The loss or a gradient is no longer finite."""


class Interrupted(KeyboardInterrupt):
    """Stopped by Ctrl-C or SIGTERM, after saving a checkpoint."""


@dataclasses.dataclass(frozen=True)
class TrainingOptions(StepOptions):
    """Options for training.

    Attributes:
        steps: Updates.
        batch_size: Sequences per update.
        mesh: Devices for each way to split the work, e.g. data=2,fsdp=4: data splits
            batches, fsdp parameters and state too, tensor each sequence's work; auto
            gives all to data.
        seed: Of initial weights, shuffling and sampling.
        log_every: Steps between metrics.
        eval_every: Steps between evaluations.
        eval_batches: Batches in each of them; the last takes all.
        checkpoint_every: Steps between checkpoints.
    """

    steps: Count = 1000
    batch_size: Count = 16
    mesh: str = "auto"
    seed: Whole = 0
    log_every: Count = 10
    eval_every: Count = 100
    eval_batches: Count = 16
    checkpoint_every: Count = 250


class Trainer:
    """Trains a task's model.

    Leaves checkpoints, metrics.jsonl, TensorBoard events, curve.png and summary.json in
    the folder.

    Args:
        task: The model, its loss and its data.
        optimizer: The update rule, its schedule and gradient clipping.
        training: Steps, batches, and what happens how often.
        folder: The run's, from `folder.claim`.
        resume: Whether to go on from its newest checkpoint.

    Raises:
        UserError: Something about the options, the data or the folder doesn't fit.
    """

    def __init__(
        self,
        task: Task,
        optimizer: OptimizerOptions,
        training: TrainingOptions,
        folder: Path,
        *,
        resume: bool = False,
    ):
        task = with_param_dtype(task, training.param_dtype)
        self.task, self.optimizer, self.training = task, optimizer, training
        self.folder, self._summary = folder, folder / "summary.json"
        self.mesh = sharding.make_mesh(sharding.mesh_sizes(training.mesh))
        self.data_part = sharding.data_part(self.mesh)
        sharding.check_batch_size(training.batch_size, training.accumulate, self.mesh)
        pipeline.check_lengths(task)
        self.schedule = make_schedule(optimizer, training.steps)
        shardings = params_sharding(task, self.mesh)
        self.tx = make_optimizer(
            optimizer, self.schedule, training.param_dtype, shardings
        )
        self.train_step = make_train_step(
            task, self.tx, training.accumulate, training.seed, self.mesh
        )
        self._evaluate = make_evaluate(task, self.mesh)
        size, seed = training.batch_size, training.seed
        self.batches = pipeline.train_batches(task, size, seed, self.data_part)
        self.about: dict[str, Any] = {
            "options": as_config({**task.options, **vars(optimizer), **vars(training)}),
            "data": pipeline.fingerprint(task),
        }
        self.checkpoints = Checkpoints(folder)
        if resume:
            self.state = self._restore()
        else:
            init = make_init(task, self.tx, self.mesh)
            self.state = first_state(task, init, training.seed)
        for name, content in task.files.items() if jax.process_index() == 0 else ():
            (self.folder / name).write_text(content, encoding="utf-8")

    def _restore(self) -> TrainState:
        """Returns the newest checkpoint's state, and puts the data where it was.

        Raises:
            UserError: It is damaged, or of a run with other options than may change.
        """
        about = self.checkpoints.load_about()
        of_data = {*self.task.options, "seq_len"}
        of_state = of_data | vars(self.optimizer).keys() | {"param_dtype"}
        if about["data"] != self.about["data"]:
            raise UserError(
                f"{self.folder}: this run began on other data"
                + (self._changed(about, of_data) or "; the text has changed since")
            )
        shapes = state_shapes(self.task, self.tx, self.mesh)
        try:
            state = self.checkpoints.restore(shapes)
        except OtherState as error:
            raise UserError(f"{error}{self._changed(about, of_state)}") from error
        if (done := int(state.step)) > self.training.steps:
            raise UserError(
                f"--steps {self.training.steps}: {done} are done already in "
                f"{self.folder}"
            )
        self.batches.set_state(about["position"])
        return state

    def _changed(self, about: Mapping[str, Any], names: Set[str]) -> str:
        """Names the options that are not what a checkpoint was made with."""
        saved, now = about["options"], self.about["options"]
        return "".join(
            f"; --{name.replace('_', '-')} was {saved[name]}, is {now[name]}"
            for name in now
            if name in names & saved.keys() and saved[name] != now[name]
        )

    @property
    def model(self) -> Any:
        """The model with its present parameters, whole and on the host."""
        return merge(self.task, sharding.to_host(self.state.params))

    def run(self) -> metrics.Result | None:
        """Trains to the last step; in all processes but the first returns None.

        Raises:
            Diverged: The loss or a gradient is no longer finite.
            Interrupted: By Ctrl-C or SIGTERM, after saving a checkpoint.
            CannotSave: The folder is full.
        """
        training, length = self.training, self.task.tokens_per_record
        first_process = jax.process_index() == 0
        print(
            f"{self.task.name}, {len(self.task.train) * length:,} tokens to train on, "
            f"{len(self.task.validation) * length:,} held out; in {self.folder}",
            flush=True,
        )
        done, began = int(self.state.step), time.perf_counter()
        shown: dict[str, str] = {}
        means: dict[str, float] = {}
        with contextlib.ExitStack() as stack:
            interrupted = stack.enter_context(interrupts())
            writer = metrics.MetricsWriter(self.folder, done) if first_process else None
            write = stack.enter_context(writer).write if writer else _nothing
            hidden = None if first_process else True  # None shows it on terminals.
            bar = stack.enter_context(
                tqdm(initial=done, total=training.steps, unit="step", disable=hidden)
            )
            since, counted = time.perf_counter(), 0  # Of training alone.
            for step in range(done + 1, training.steps + 1):
                batch = sharding.put_batch(next(self.batches), self.mesh)
                self.state, step_metrics = self.train_step(self.state, batch)
                last = step == training.steps
                counted += 1
                bar.update()
                if step == done + 1:  # Leaves compilation out of tokens/s.
                    jax.block_until_ready(self.state)
                    since, counted = time.perf_counter(), 0
                if last or step % training.log_every == 0:
                    row = _finite_floats(step_metrics, step)
                    row["learning_rate"] = float(np.asarray(self.schedule(step - 1)))
                    shown["loss"] = f"{row['loss']:.3f}"
                    if counted:
                        tokens = counted * training.batch_size * length
                        speed = tokens / (time.perf_counter() - since)
                        row["tokens_per_second"] = speed
                        shown["tokens/s"] = f"{speed:,.0f}"
                        since, counted = time.perf_counter(), 0
                    write(step, **row)
                    bar.set_postfix(shown, refresh=False)
                if last or step % training.eval_every == 0:
                    means = self.evaluate(None if last else training.eval_batches)
                    write(step, **{f"validation_{name}": means[name] for name in means})
                    shown |= {f"validation {k}": f"{means[k]:.3f}" for k in means}
                    text = "  ".join(f"{name} {value}" for name, value in shown.items())
                    tqdm.write(f"step {step:>{len(str(training.steps))}}  {text}")
                    sys.stdout.flush()
                    since, counted = time.perf_counter(), 0
                # Several processes can only stop together.
                asked = jax.process_count() == 1 or step % training.log_every == 0
                stops = asked and sharding.any_process(bool(interrupted))
                if last or stops or step % training.checkpoint_every == 0:
                    _finite_floats(step_metrics, step)
                    self.save()
                    since, counted = time.perf_counter(), 0
                if stops and not last:
                    raise Interrupted
        seconds = time.perf_counter() - began
        if done == training.steps:  # All was done but what follows.
            means = self.evaluate()
            with contextlib.suppress(OSError, ValueError, KeyError):
                seconds = json.loads(self._summary.read_text("utf-8"))["seconds"]
        return self._conclude(seconds, means) if first_process else None

    def evaluate(
        self, limit: int | None = None, records: Records | None = None
    ) -> dict[str, float]:
        """Returns metrics on all held-out records, or on `limit` batches of them.

        `records` takes the place of the task's own, e.g. for a test at the end.
        """
        batches = pipeline.validation_batches(
            self.task, self.training.batch_size, limit, records, self.data_part
        )
        return self._evaluate(self.state.params, batches)

    def save(self) -> None:
        """Saves a checkpoint."""
        position = self.batches.get_state()
        self.checkpoints.save(self.state, **self.about, position=position)

    def _conclude(self, seconds: float, means: Mapping[str, float]) -> metrics.Result:
        rows = metrics.read(self.folder)
        losses = [row["loss"] for row in rows if "loss" in row]
        memory = state_memory(self.tx, self.state.params)
        steps, batch = self.training.steps, self.training.batch_size
        result = metrics.Result(
            optimizer=self.optimizer.optimizer,
            steps=steps,
            tokens=steps * batch * self.task.tokens_per_record,
            seconds=seconds,
            loss=float(np.mean(losses[-10:])) if losses else None,
            validation=means,
            references=self.task.references,
            parameters=memory.num_params,
            optimizer_bytes=memory.total,
            adamw_bytes=memory.adamw,
        )
        text = json.dumps(dataclasses.asdict(result), indent=2) + "\n"
        self._summary.write_text(text, encoding="utf-8")
        metrics.plot_curve(
            self.folder / "curve.png",
            f"{self.task.name}, {result.optimizer}",
            rows,
            self.task.references,
        )
        return result


def _nothing(step: int, **metrics: float) -> None:
    """Writes in the other processes."""


def _finite_floats(found: Mapping[str, jax.Array], step: int) -> dict[str, float]:
    values = {name: float(value) for name, value in found.items()}
    for name in ("loss", "gradient_norm"):
        if not math.isfinite(values[name]):
            raise Diverged(
                f"{name} is {values[name]} at step {step}: lower --learning-rate, or "
                "lengthen --warmup"
            )
    return values

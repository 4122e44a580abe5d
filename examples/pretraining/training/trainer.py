"""The training loop that all examples share."""

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import jax
import numpy as np

from came_optax import state_memory
from pretraining.data import pipeline
from pretraining.errors import Diverged, Interrupted, UserError
from pretraining.files import write_atomically
from pretraining.options import non_negative_int, option, positive_int
from pretraining.task import Records, Task, with_param_dtype
from pretraining.training import devices, metrics, plots
from pretraining.training.checkpoints import Checkpoints, OtherState
from pretraining.training.interrupts import InterruptRequest
from pretraining.training.optimizers import (
    OptimizerOptions,
    make_optimizer,
    make_schedule,
)
from pretraining.training.progress import Progress, Throughput
from pretraining.training.step import (
    StepOptions,
    TrainState,
    first_state,
    make_evaluate,
    make_init,
    make_train_step,
    merge,
    state_shapes,
)
from pretraining.training.summary import Result


@dataclasses.dataclass(frozen=True)
class TrainingOptions(StepOptions):
    """Options for training."""

    steps: int = option(1000, "updates", type=positive_int)
    batch_size: int = option(16, "sequences per update", type=positive_int)
    mesh: Mapping[str, int] | None = option(
        None,
        "devices for each way to split the work, e.g. data=2,fsdp=4: data splits "
        "batches, fsdp parameters and state too, tensor each sequence's work (default: "
        "auto, data takes all)",
        type=devices.mesh_sizes,
        metavar="AXIS=N,...",
    )
    seed: int = option(
        0, "of initial weights, shuffling and sampling", type=non_negative_int
    )
    log_every: int = option(10, "steps between metrics", type=positive_int)
    eval_every: int = option(100, "steps between evaluations", type=positive_int)
    eval_batches: int = option(
        16, "batches in each of them; the last takes all", type=positive_int
    )
    checkpoint_every: int = option(250, "steps between checkpoints", type=positive_int)


class Trainer:
    """Trains a task's model.

    Leaves checkpoints, metrics.jsonl, TensorBoard events, curve.png and summary.json in
    the folder.

    Args:
        task: The model, its loss and its data.
        optimizer: The update rule, its schedule and gradient clipping.
        training: Steps, batches, and what happens how often.
        folder: The run's, from `runs.claim`.
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
        self.mesh = devices.make_mesh(training.mesh)
        self.data_part = devices.data_part(self.mesh)
        devices.check_batch_size(training.batch_size, training.accumulate, self.mesh)
        pipeline.check_lengths(task)
        self.schedule = make_schedule(optimizer, training.steps)
        self.tx = make_optimizer(optimizer, self.schedule)
        self.train_step = make_train_step(
            task, self.tx, training.accumulate, training.seed, self.mesh
        )
        self._evaluate = make_evaluate(task, self.mesh)
        self.batches = pipeline.train_batches(
            task, training.batch_size, training.seed, self.data_part
        )
        self.about = {
            "options": dict(task.options)
            | dataclasses.asdict(optimizer)
            | dataclasses.asdict(training),
            "data": pipeline.fingerprint(task),
        }
        self.checkpoints = Checkpoints(folder)
        if resume:
            self.state = self._restore()
        else:
            init = make_init(task, self.tx, self.mesh)
            self.state = first_state(task, init, training.seed)
        if devices.is_first_process():
            for name, content in task.files.items():
                write_atomically(self.folder / name, content)

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
        try:
            state = self.checkpoints.restore(
                state_shapes(self.task, self.tx, self.mesh)
            )
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
        saved, now = about["options"], json.loads(json.dumps(self.about["options"]))
        return "".join(
            f"; --{name.replace('_', '-')} was {saved[name]}, is {now[name]}"
            for name in now
            if name in names & saved.keys() and saved[name] != now[name]
        )

    @property
    def model(self) -> Any:
        """The model with its present parameters, whole and on the host."""
        return merge(self.task, devices.to_host(self.state.params))

    def run(self) -> Result | None:
        """Trains to the last step; in all processes but the first returns None.

        Raises:
            Diverged: The loss or a gradient is no longer finite.
            Interrupted: By Ctrl-C or SIGTERM, after saving a checkpoint.
            CannotSave: The folder is full.
        """
        training, last_step = self.training, self.training.steps
        length = self.task.tokens_per_record
        print(
            f"{self.task.name}, {len(self.task.train) * length:,} tokens to train on, "
            f"{len(self.task.validation) * length:,} held out; in {self.folder}",
            flush=True,
        )
        first_step = int(self.state.step) + 1
        began = time.perf_counter()
        speed = Throughput(training.batch_size * self.task.tokens_per_record)
        with (
            InterruptRequest() as interrupt,
            metrics.MetricsWriter(
                self.folder, first_step - 1, enabled=devices.is_first_process()
            ) as writer,
            Progress(first_step - 1, last_step) as progress,
        ):
            for step in range(first_step, last_step + 1):
                batch = devices.put_batch(next(self.batches), self.mesh)
                self.state, step_metrics = self.train_step(self.state, batch)
                last = step == last_step
                if step == first_step:  # Leaves compilation out of tokens/s.
                    jax.block_until_ready(self.state)
                    speed.restart()
                else:
                    speed.count_step()
                progress.advance()

                if last or step % training.log_every == 0:
                    row = _finite_floats(step_metrics, step)
                    row["learning_rate"] = float(np.asarray(self.schedule(step - 1)))
                    row["tokens_per_second"] = speed.measure()
                    writer.write(step, **row)
                    progress.show(
                        {
                            "loss": f"{row['loss']:.3f}",
                            "lr": f"{row['learning_rate']:.1e}",
                            "tokens/s": f"{row['tokens_per_second']:,.0f}",
                        }
                    )
                if last or step % training.eval_every == 0:
                    means = self.evaluate(None if last else training.eval_batches)
                    writer.write(step, **{f"validation_{k}": means[k] for k in means})
                    progress.show({f"validation {k}": f"{means[k]:.3f}" for k in means})
                    progress.print_line(step)
                    speed.restart()
                interrupted = interrupt.received
                if jax.process_count() > 1:  # They can only stop together.
                    asked = step % training.log_every == 0
                    interrupted = asked and devices.any_process(interrupted)
                if last or step % training.checkpoint_every == 0 or interrupted:
                    _finite_floats(step_metrics, step)
                    self.save()
                    speed.restart()
                if interrupted and not last:
                    raise Interrupted
        seconds = time.perf_counter() - began
        if first_step > last_step:  # All was done but what follows.
            means = self.evaluate()
            with contextlib.suppress(OSError, ValueError, KeyError):
                seconds = json.loads(self._summary.read_text("utf-8"))["seconds"]
        return self._conclude(seconds, means) if devices.is_first_process() else None

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
        self.checkpoints.save(
            self.state, **self.about, position=self.batches.get_state()
        )

    def _conclude(self, seconds: float, means: Mapping[str, float]) -> Result:
        rows = metrics.read(self.folder)
        losses = [row["loss"] for row in rows if "loss" in row]
        memory = state_memory(self.tx, self.state.params)
        result = Result(
            optimizer=self.optimizer.optimizer,
            steps=self.training.steps,
            tokens=self.training.steps
            * self.training.batch_size
            * self.task.tokens_per_record,
            seconds=seconds,
            loss=float(np.mean(losses[-10:])) if losses else None,
            validation=means,
            references=self.task.references,
            parameters=memory.num_params,
            optimizer_bytes=memory.total,
            adamw_bytes=memory.adamw,
        )
        write_atomically(
            self._summary,
            json.dumps(dataclasses.asdict(result), indent=2) + "\n",
        )
        plots.plot_curve(
            self.folder / "curve.png",
            f"{self.task.name}, {result.optimizer}",
            rows,
            self.task.references,
        )
        return result


def _finite_floats(
    step_metrics: Mapping[str, jax.Array], step: int
) -> dict[str, float]:
    values = {name: float(value) for name, value in step_metrics.items()}
    for name in ("loss", "gradient_norm"):
        if not math.isfinite(values[name]):
            raise Diverged(
                f"{name} is {values[name]} at step {step}: lower --learning-rate, or "
                "lengthen --warmup"
            )
    return values

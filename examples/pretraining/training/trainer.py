"""The training loop that all examples share."""

import collections
import dataclasses
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from came_optax import state_memory
from pretraining.data import pipeline
from pretraining.errors import Diverged, Interrupted, UserError
from pretraining.files import write_atomically
from pretraining.options import option, positive_int
from pretraining.task import Record, Task, with_param_dtype
from pretraining.training import devices, metrics, plots, runs
from pretraining.training.checkpoints import Checkpoints
from pretraining.training.interrupts import InterruptRequest
from pretraining.training.optimizers import (
    OptimizerOptions,
    make_optimizer,
    make_schedule,
)
from pretraining.training.progress import Progress, Throughput
from pretraining.training.runs import RunOptions
from pretraining.training.step import make_eval_step, make_init, make_train_step, merge
from pretraining.training.summary import Result


@dataclasses.dataclass(frozen=True)
class TrainingOptions:
    """Options for training."""

    steps: int = option(1000, "updates", type=positive_int)
    batch_size: int = option(16, "sequences per update", type=positive_int)
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
        "devices for each way to split the work, e.g. data=2,fsdp=4: data splits "
        "batches, fsdp parameters and state too, tensor each sequence's work (default: "
        "data takes all)",
        type=devices.mesh_sizes,
        metavar="AXIS=N,...",
    )
    seed: int = option(0, "of initial weights, shuffling and sampling", type=int)
    log_every: int = option(10, "steps between metrics", type=positive_int)
    eval_every: int = option(100, "steps between evaluations", type=positive_int)
    eval_batches: int = option(
        16, "batches in each of them; the last takes all", type=positive_int
    )
    checkpoint_every: int = option(250, "steps between checkpoints", type=positive_int)


class Trainer:
    """Trains a task's model.

    Leaves checkpoints, metrics.jsonl, TensorBoard events, curve.png and summary.json in
    `run.output`.

    Args:
        task: The model, its loss and its data.
        optimizer: The update rule, its schedule and gradient clipping.
        training: Steps, batches, and what happens how often.
        run: The folder, and whether to go on from its newest checkpoint.

    Raises:
        UserError: Something about the options, the data or the folder doesn't fit.
    """

    def __init__(
        self,
        task: Task,
        optimizer: OptimizerOptions,
        training: TrainingOptions,
        run: RunOptions,
    ):
        task = with_param_dtype(task, training.param_dtype)
        self.task, self.optimizer, self.training = task, optimizer, training
        self.folder = Path(run.output)
        self.mesh = devices.make_mesh(training.mesh)
        self.data_part = devices.data_part(self.mesh)
        devices.check_batch_size(training.batch_size, training.accumulate, self.mesh)
        pipeline.check_lengths(task)
        self.schedule = make_schedule(optimizer, training.steps)
        self.tx = make_optimizer(optimizer, self.schedule)
        self.train_step = make_train_step(
            task, self.tx, training.accumulate, training.seed, self.mesh
        )
        self.eval_step = make_eval_step(task, self.mesh)
        self.batches = pipeline.train_batches(
            task, training.batch_size, training.seed, self.data_part
        )
        runs.prepare(self.folder, resume=run.resume)
        self.checkpoints = Checkpoints(self.folder)
        init = make_init(task, self.tx, training.seed, self.mesh)
        if run.resume:
            self.state = self.checkpoints.restore(init)
            about = self.checkpoints.load_about()
            if about["data"] != pipeline.fingerprint(task.train):
                raise UserError(f"{self.folder}: this run began on another text")
            self.batches.set_state(about["position"])
        else:
            self.state = init()
            if task.pretrained is not None:
                of_params = jax.tree.map(lambda p: p.sharding, self.state.params)
                params = task.pretrained(self.state.params)
                params = jax.tree.map(
                    lambda new, p, place: jax.device_put(new.astype(p.dtype), place),
                    *(params, self.state.params, of_params),
                )
                self.state = self.state._replace(params=params)
        if devices.is_first_process():
            for name, content in task.files.items():
                write_atomically(self.folder / name, content)

    @property
    def model(self) -> Any:
        """The model with its present parameters, whole and on the host."""
        return merge(self.task, devices.to_host(self.state.params))

    def run(self) -> Result | None:
        """Trains to the last step; in all processes but the first returns None.

        Raises:
            Diverged: The loss or a gradient is no longer finite.
            Interrupted: By Ctrl-C or SIGTERM, after saving a checkpoint.
            UserError: The folder is full.
        """
        training, last_step = self.training, self.training.steps
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
                    row["learning_rate"] = float(self.schedule(step - 1))
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
                    raise Interrupted(step, self.folder)
        seconds = time.perf_counter() - began
        return self._conclude(seconds) if devices.is_first_process() else None

    def evaluate(
        self, limit: int | None = None, records: Sequence[Record] | None = None
    ) -> dict[str, float]:
        """Returns metrics on all held-out records, or on `limit` batches of them.

        `records` takes the place of the task's own, e.g. for a test at the end.
        """
        sums = collections.defaultdict(lambda: np.zeros(2))
        size = self.training.batch_size
        for batch in pipeline.validation_batches(
            self.task, size, limit, records, self.data_part
        ):
            batch = devices.put_batch(batch, self.mesh)
            for name, mean in self.eval_step(self.state.params, batch).items():
                sums[name] += np.asarray(mean, np.float64)
        return {name: float(total / count) for name, (total, count) in sums.items()}

    def save(self) -> None:
        """Saves a checkpoint."""
        self.checkpoints.save(
            self.state,
            options=dict(self.task.options)
            | dataclasses.asdict(self.optimizer)
            | dataclasses.asdict(self.training),
            data=pipeline.fingerprint(self.task.train),
            position=self.batches.get_state(),
        )

    def _conclude(self, seconds: float) -> Result:
        rows = metrics.read(self.folder)
        params = self.state.params
        result = Result(
            optimizer=self.optimizer.optimizer,
            steps=self.training.steps,
            tokens=self.training.steps
            * self.training.batch_size
            * self.task.tokens_per_record,
            seconds=seconds,
            loss=float(np.mean([row["loss"] for row in rows if "loss" in row][-10:])),
            validation={
                name.removeprefix("validation_"): value
                for name, value in rows[-1].items()
                if name.startswith("validation_")
            },
            references=self.task.references,
            parameters=sum(leaf.size for leaf in jax.tree.leaves(params)),
            optimizer_bytes=state_memory(self.tx, params).total,
            adamw_bytes=state_memory(optax.adamw(self.schedule), params).total,
        )
        write_atomically(
            self.folder / "summary.json",
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

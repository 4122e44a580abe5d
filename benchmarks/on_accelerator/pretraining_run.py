"""GPT-2 small on real text, by the examples' own task and trainer.

Every optimizer sees the same tokens in the same order, at one learning rate that was
not tuned. The first is interrupted half-way, as by a preemption, and resumed.
"""

import os
import signal
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pretrain_gpt2
from on_accelerator.recorder import Recorder, Skipped
from pretraining.data.corpus import TextOptions, load
from pretraining.errors import Interrupted, UserError
from pretraining.task import Task
from pretraining.training import metrics
from pretraining.training.optimizers import OptimizerOptions
from pretraining.training.trainer import Trainer, TrainingOptions

CORPORA = ("sotu", "movies", "wikipedia")
RULES: dict[str, dict[str, Any]] = {
    "steady CAME, int8": {"optimizer": "came", "mu_dtype": "int8"},
    "AdamW": {"optimizer": "adamw"},
    "NAdamW": {"optimizer": "nadamw"},
    "Adafactor": {"optimizer": "adafactor"},
}
# GPT-3's for a model of this size (Brown et al., 2020, table 2.1).
LEARNING_RATE = 6e-4
BATCH = {"full": 32, "nano": 16}  # Sequences.
MOST_SECONDS = 75  # Of training with one optimizer.
OVERHEAD = 35  # Seconds of compiling, evaluating and saving with one optimizer.
# Where the training step was not timed before.
ASSUMED_TOKENS_PER_SECOND = 100_000
STEPS = {"full": (100, 1500), "nano": (24, 24)}  # The fewest and the most.
TO_SAVE = 10  # Seconds before the end at which a run is stopped.
NANO_TEXT = 200_000  # Characters.


def run(record: Recorder, optimizers: Sequence[str]) -> None:
    """Records the loss curve of each optimizer."""
    with tempfile.TemporaryDirectory() as folder:
        task = make_task(Path(folder), record.nano)
        steps = number_of_steps(record, task, len(optimizers))
        tokens = steps * BATCH[record.size] * task.tokens_per_record
        in_text = len(task.train) * task.tokens_per_record
        record.write(
            case="data",
            steps=steps,
            tokens=tokens,
            epochs=tokens / in_text,
            references=dict(task.references),
            corpora=installed(),
        )
        for i, name in enumerate(optimizers):
            with record.attempt(optimizer=name):
                output = Path(folder) / str(i)
                train(record, name, task, steps, output, interrupts=i == 0)


def make_task(folder: Path, nano: bool) -> Task:
    """Returns the example's task on all corpora that are installed."""
    corpora = installed()
    if not corpora:
        raise Skipped("no corpus is installed")
    files = []
    for corpus in corpora[:1] if nano else corpora:
        text = "\n".join(load(TextOptions(corpus=corpus)))
        path = folder / f"{corpus}.txt"
        path.write_text(text[:NANO_TEXT] if nano else text, encoding="utf-8")
        files.append(str(path))
    model = pretrain_gpt2.ModelOptions(size="nano" if nano else "small")
    return pretrain_gpt2.make_task(model, TextOptions(text=files))


def installed() -> list[str]:
    """Returns the names of the corpora that are installed."""
    found = []
    for corpus in CORPORA:
        try:
            load(TextOptions(corpus=corpus))
        except UserError as error:
            print(error)
        else:
            found.append(corpus)
    return found


def number_of_steps(record: Recorder, task: Task, runs: int) -> int:
    """Returns how many updates there is time for with each optimizer."""
    earlier = [r["steps"] for r in record.earlier() if r.get("case") == "data"]
    if earlier:  # What is compared has to have as many.
        return earlier[-1]
    rates = [r["tokens/s"] for r in record.earlier() if "tokens/s" in r]
    rate = rates[-1] if rates else ASSUMED_TOKENS_PER_SECOND
    seconds = min((record.seconds_left() - TO_SAVE) / runs - OVERHEAD, MOST_SECONDS)
    fewest, most = STEPS[record.size]
    tokens_per_step = BATCH[record.size] * task.tokens_per_record
    return min(max(int(seconds * rate / tokens_per_step), fewest), most)


def train(
    record: Recorder, name: str, task: Task, steps: int, output: Path, interrupts: bool
) -> None:
    """Records the loss of one run against tokens and seconds of training."""
    optimizer = OptimizerOptions(**RULES[name], learning_rate=LEARNING_RATE)
    training = TrainingOptions(
        steps=steps,
        batch_size=BATCH[record.size],
        accumulate=2,
        log_every=max(steps // 60, 1),
        eval_every=max(steps // 6, 1),
        eval_batches=4,
        checkpoint_every=steps,
    )

    def too_late(step: int) -> bool:
        return record.seconds_left() < TO_SAVE

    def half_way(step: int) -> bool:
        return step >= steps // 2 or too_late(step)

    output.mkdir()
    resumed_at: list[int] = []
    result = None
    stop_when = half_way if interrupts else too_late
    while result is None and not (resumed_at and too_late(0)):
        trainer = Trainer(task, optimizer, training, output, resume=bool(resumed_at))
        try:
            with Watch(output, stop_when):
                result = trainer.run()
        except Interrupted:
            resumed_at.append(int(trainer.state.step))
            stop_when = too_late
    tokens_per_step = BATCH[record.size] * task.tokens_per_record
    rows = with_seconds(metrics.read(output), tokens_per_step)
    if not rows:
        raise RuntimeError(f"{name}: stopped before the first metrics")
    losses = [row["validation_loss"] for row in rows if "validation_loss" in row]
    record.write(
        optimizer=name,
        learning_rate=LEARNING_RATE,
        finished=result is not None,
        resumed_at=resumed_at,
        state=result.optimizer_bytes if result else None,
        validation=losses[-1] if losses else None,
        rows=rows,
    )


def with_seconds(
    rows: Sequence[dict[str, Any]], tokens_per_step: int
) -> list[dict[str, float]]:
    """Adds tokens seen and seconds of training, by the rates since the row before."""
    found, tokens, seconds = [], 0, 0.0
    for row in rows:
        if rate := row.get("tokens_per_second"):  # 0 of the step that compiles.
            seconds += (row["step"] * tokens_per_step - tokens) / rate
            tokens = row["step"] * tokens_per_step
        losses = {k: row[k] for k in ("loss", "validation_loss") if k in row}
        at = {"step": row["step"], "tokens": row["step"] * tokens_per_step}
        found.append(at | {"seconds": round(seconds, 2)} | losses)
    return found


class Watch:
    """Asks this process to stop, as Ctrl-C would, once a run has come to a step."""

    def __init__(self, run: Path, stop_when: Any):
        self._run, self._stop_when = run, stop_when
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._done.wait(0.05):
            rows = metrics.read(self._run)
            if rows and self._stop_when(rows[-1]["step"]):
                os.kill(os.getpid(), signal.SIGTERM)
                return

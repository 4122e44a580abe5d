r"""Compare CAME with other optimizers, each at the best of as many learning rates.

    python examples/compare_optimizers.py --task gpt2

trains the smallest GPT-2 under every optimizer at one seed and learning rates that are
10^(1/4) apart around its best, then with more seeds at that best: 8 to 10 runs of about
15 s each on one CPU core, or a minute each for BERT and T5. It goes on where it stopped
when run again. Writes a log of all runs, tables and plots into
runs/compare-gpt2. docs/learning-rate.md shows what to expect.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pretraining.training.interrupts import quit_on_ctrl_c

with quit_on_ctrl_c(__name__ == "__main__"):  # Imports take seconds.
    from comparing import search
    from comparing.figures import draw
    from comparing.methods import (
        ABLATIONS,
        BEFORE_NESTEROV,
        COMPARISON,
        METHODS,
        REFERENCE,
        STORAGE,
        STUDY,
        WEIGHTS,
    )
    from comparing.runs import Log
    from comparing.series import Series, Settings
    from comparing.summary import summarize
    from comparing.table import make_same_rate_table, make_tables
    from pretraining import cli, scripts
    from pretraining.data import corpus
    from pretraining.data.labelled import LabelledTextOptions
    from pretraining.errors import UserError
    from pretraining.files import write_atomically
    from pretraining.options import (
        option,
        positive_float,
        positive_int,
        vocabulary_size,
    )
    from pretraining.task import Task

LOG_EVERY = 10
# A run of the smallest size that ranks optimizers. BERT learns from one token in seven,
# and on small batches no more for a long time than how often each token occurs.
# The classifier is pretrained, and sees half of the sentences.
RUNS = {
    "gpt2": dict(steps=600, batch_size=8, eval_batches=48, evaluations=10),
    "bert": dict(steps=600, batch_size=256, eval_batches=24, evaluations=10),
    "t5": dict(steps=600, batch_size=16, eval_batches=48, evaluations=10),
    "classifier": dict(steps=100, batch_size=32, eval_batches=26, evaluations=2),
}
# What fine-tuning takes of a method's learning rate, where the search begins.
FINE_TUNING = 0.05
# What has a table and plots of its own.
GROUPS = {
    "comparison": COMPARISON,
    "ablations": (REFERENCE, *ABLATIONS),
    "study": (REFERENCE, BEFORE_NESTEROV, "came", *STUDY),
    "storage": (REFERENCE, *STORAGE),
    "weights": (REFERENCE, *WEIGHTS),
}


def _of_task(name: str, help: str) -> Any:
    defaults = ", ".join(f"{task} {run[name]}" for task, run in RUNS.items())
    return option(None, f"{help} (default: {defaults})", type=positive_int)


@dataclasses.dataclass(frozen=True)
class CompareOptions:
    """Options for the comparison."""

    task: str = option("gpt2", "to train on", choices=RUNS)
    size: str | None = option(None, "of the model (default: nano; classifier: MiniLM)")
    vocab_size: int | None = option(
        None, "tokens to learn (default: the size's own)", type=vocabulary_size
    )
    seq_len: int | None = option(
        None, "tokens of a sequence (default: the size's own)", type=positive_int
    )
    methods: Sequence[str] | None = option(
        None,
        f"what to compare, of {', '.join(METHODS)} (default: all)",
        nargs="+",
        choices=METHODS,
        metavar="METHOD",
    )
    steps: int | None = _of_task("steps", "updates of a run")
    batch_size: int | None = _of_task("batch_size", "sequences per update")
    eval_batches: int | None = _of_task(
        "eval_batches", "held-out batches to evaluate on, always the same"
    )
    seeds: int = option(3, "at each best learning rate", type=positive_int)
    learning_rates: Sequence[float] | None = option(
        None,
        "to try, each as the nearest 10^(k/4), in place of the search",
        nargs="+",
        type=positive_float,
        metavar="X",
    )
    output: str | None = option(
        None,
        "folder of all results (default: runs/compare-TASK or -TASK-SIZE)",
        metavar="FOLDER",
    )


def main() -> None:
    options, text = cli.parse_without_run(__doc__, [CompareOptions, corpus.TextOptions])
    name = "-".join(["compare", options.task, *filter(None, [options.size])])
    folder = Path(options.output or f"runs/{name}")
    run = {
        name: getattr(options, name, None) or default
        for name, default in RUNS[options.task].items()
    }
    if run["steps"] % LOG_EVERY:
        raise UserError(f"--steps {run['steps']}: must be a multiple of {LOG_EVERY}")
    settings = Settings(**run, log_every=LOG_EVERY)
    task = make_task(options, text)
    common = {"task": task.name} | dict(task.options) | {"seq_len": options.seq_len}
    check_settings(folder, common | dataclasses.asdict(settings))
    log = Log(folder)
    for name in options.methods or METHODS:
        if METHODS[name].installed:
            compare(task, name, settings, options, log)
        else:
            print(f"{name}: left out, needs the package {METHODS[name].package}")
    report(task, folder, log)


def make_task(options: CompareOptions, text: corpus.TextOptions) -> Task:
    """Returns the task that the example of that name trains on.

    Raises:
        UserError: The task's model has no such size, or no text but its own.
    """
    if options.task == "classifier":
        own = (options.size, options.vocab_size, options.seq_len)
        if any(own) or text != corpus.TextOptions():
            raise UserError(
                "--task classifier: has no --size, --vocab-size, --seq-len or texts of "
                "yours"
            )
        import finetune_classifier as finetune

        sentences = LabelledTextOptions()
        model = finetune.ModelOptions()
        return finetune.make_task(model, sentences, finetune.LENGTH)[0]
    script, model = scripts.load(options.task, options.size or "nano")
    model = dataclasses.replace(model, vocab_size=options.vocab_size)
    task: Task = script.make_task(model, text, options.seq_len)
    return task


def compare(
    task: Task, name: str, settings: Settings, options: CompareOptions, log: Log
) -> None:
    """Does the runs of one method that are not done yet."""
    method, series = METHODS[name], None

    def loss(index: int, seed: int) -> float:
        nonlocal series
        learning_rate = search.learning_rate(index)
        run = log.find(name, learning_rate, seed)
        if run is None:
            series = series or Series(task, method, settings)
            about = {"task": task.name, "method": name, "steps": settings.steps}
            run = series.run(learning_rate, seed, about)
            log.add(run)
            print(
                f"{name:<25} lr {learning_rate:.2e} seed {seed}: {run.final():.4f} "
                f"in {run.rows[-1]['seconds']:.0f} s",
                flush=True,
            )
        return run.final()

    given = map(search.index_of, options.learning_rates or ())
    sweep = {index: loss(index, 0) for index in given}
    if not sweep:
        assert method.options.learning_rate is not None
        factor = FINE_TUNING if task.pretrained else 1.0
        first = search.index_of(method.options.learning_rate * factor)
        while (index := search.next_index(sweep, first)) is not None:
            sweep[index] = loss(index, 0)
    # Seeds at the best; and at what is best then, where others fare worse than seed 0.
    losses = {index: [value] for index, value in sweep.items()}
    while len(losses[index := search.best_mean(losses)]) < options.seeds:
        losses[index] += [loss(index, seed) for seed in range(1, options.seeds)]
    if log.cost(name) is None:
        series = series or Series(task, method, settings)
        log.add_cost(name, series.cost())


def report(task: Task, folder: Path, log: Log) -> None:
    """Writes tables and plots of the methods whose runs are all done."""
    everything = [summarize(log, name) for name in METHODS]
    known = [summary for summary in everything if summary is not None]
    for group, names in GROUPS.items():
        members = [summary for summary in known if summary.name in names]
        if {summary.name for summary in members} - {REFERENCE}:
            tables = make_tables(members, known)
            write_atomically(folder / f"{group}.md", tables)
            draw(folder / f"{group}.png", task.name, members)
            print(f"\n{tables}")
    if (table := make_same_rate_table(log, list(METHODS))) is not None:
        write_atomically(folder / "same_rate.md", table)


def check_settings(folder: Path, common: dict[str, Any]) -> None:
    """Writes down what the runs have in common.

    Raises:
        UserError: The folder holds runs with other settings.
    """
    path = folder / "settings.json"
    folder.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        write_atomically(path, json.dumps(common) + "\n")
    there = json.loads(path.read_text(encoding="utf-8"))
    for name, value in common.items():
        if there.get(name) != value:
            raise UserError(
                f"{folder}: holds runs with {name} {there.get(name)}, not {value}; "
                "choose another --output"
            )


if __name__ == "__main__":
    cli.run(main)

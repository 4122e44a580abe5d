r"""Compare optimizers by a protocol that was written down before.

    python examples/compare_optimizers.py --protocol docs/results/study/protocol.md

takes the next run that is neither done nor taken, and the next, until all are done;
then it reports. Start it once for each core: any number of processes share a folder's
work, and a run that was interrupted goes on where it was. An optimizer of your own is
one more line of the protocol, which shows it.
"""

import dataclasses
import json
import os
import subprocess
import time
from pathlib import Path

# One run a core; read when JAX starts.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
)

import jax

from comparing import log, protocol, report, tasks
from comparing.training import Series
from running import command_line
from task import with_param_dtype

WAIT = 20  # Seconds until what others do may let a run begin.


@dataclasses.dataclass(frozen=True)
class CompareOptions:
    """Options for the comparison.

    Attributes:
        protocol: What to run.
        output: Folder of the runs (by default the protocol's).
        report: Only report on what is done.
        time: Only measure the seconds of a step, into costs.json.
    """

    protocol: str = "docs/results/study/protocol.md"
    output: str | None = None
    report: bool = False
    time: bool = False


def main() -> None:
    (options,) = command_line.parse_without_run(__doc__, [CompareOptions])
    path = Path(options.protocol)
    study = protocol.read(path)
    folder = Path(options.output or path.parent)
    worker = Worker(study, folder)
    if options.time:
        worker.time()
    elif not options.report:
        worker.work()
    print(report.write(study, folder))


class Worker:
    """Does the runs of a study that are left, with others at the same time."""

    def __init__(self, study: protocol.Protocol, folder: Path):
        self.study, self.folder = study, folder
        self.path = folder / "runs.jsonl"
        self.commit = commit()  # That of the code as it was loaded.
        self._splits: dict[str, tasks.Splits] = {}
        self._series: dict[tuple[str, str], Series] = {}

    def work(self) -> None:
        """Returns when all runs are done."""
        while self.next():
            pass

    def next(self) -> bool:
        """Does a run; or waits, where none can begin. False if none is left."""
        runs = list(self.study.pending(log.losses(log.read(self.path))))
        for run in runs:
            with log.claim(self.folder / "state", run) as state:
                # Another process may have ended it since the log was read.
                if state is not None and run.key not in log.read(self.path):
                    self.run(run, state)
                    return True
        if runs:
            time.sleep(WAIT)
        return bool(runs)

    def run(self, run: protocol.Run, state: Path) -> None:
        """Does a run and logs it."""
        part = self.study.parts[run.part]
        series = self.series(part.task, run)
        row = series.run(
            run.settings,
            run.seed,
            series.steps(part.tokens_per_parameter),
            self.study.tasks[part.task]["evaluations"],
            tuning=part.kind != "judge",
            path=state,
        )
        about = {"task": part.task, "commit": self.commit, "jax": jax.__version__}
        log.append(self.path, run._asdict() | about | row)
        state.unlink(missing_ok=True)
        loss = "diverged" if row["loss"] is None else f"{row['loss']:.4f}"
        settings = " ".join(f"{k} {v:g}" for k, v in run.settings.items())
        print(
            f"{run.part} {run.optimizer} seed {run.seed}: {loss} in "
            f"{row['seconds']:.0f} s ({settings})",
            flush=True,
        )

    def time(self) -> None:
        """Writes seconds a step of all optimizers, in turn, on tasks that have runs."""
        results = report.Results(self.study, self.folder)
        costs = {}
        for task in self.study.tasks:
            judged, every = results.judged(task), {}
            if len(judged) < 2:
                continue
            for name, runs in judged.items():
                row = next(iter(runs.values()))
                run = protocol.Run("", name, row["settings"], 0)
                every[name] = self.series(task, run).timer(run.settings)
            rounds = [{name: step() for name, step in every.items()} for _ in range(12)]
            costs[task] = {name: min(r[name] for r in rounds[2:]) for name in every}
            (self.folder / "costs.json").write_text(json.dumps(costs) + "\n")

    def series(self, task: str, run: protocol.Run) -> Series:
        """Returns what is compiled once for an optimizer on a task."""
        values = self.study.tasks[task]
        if task not in self._splits:
            # Of one task at a time: the next part has another.
            self._splits, self._series = {}, {}
            corpora = self.study.corpora
            self._splits[task] = tasks.make(
                task, values["model"], corpora, self.folder / "state"
            )
        if (task, run.optimizer) not in self._series:
            make = self.study.build(run.optimizer, log.losses(log.read(self.path)))
            splits = self._splits[task]
            dtype = self.study.optimizers[run.optimizer].param_dtype
            splits = dataclasses.replace(
                splits, task=with_param_dtype(splits.task, dtype)
            )
            self._series[task, run.optimizer] = Series(
                splits, values["batch_size"], make, run.settings
            )
        return self._series[task, run.optimizer]


def commit() -> str:
    """Returns what git calls this code, "unknown" where there is no git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    found = subprocess.run(
        command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or "unknown"


if __name__ == "__main__":
    command_line.run(main)

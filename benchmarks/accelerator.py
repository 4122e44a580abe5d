r"""What does CAME do on a real accelerator: values, times, memory, a pretraining run?

Runs on the first device that JAX finds, most important first:

    machine   which device it is, and what it can copy and multiply
    values    every way to store momentum gives what plain code on the CPU gives
    update    the time of an update beside AdamW, Adafactor, Muon and PyTorch
    step      GPT-2 small's training step: tokens per second, peak memory
    largest   the largest model that the compiler promises trains, one larger doesn't
    pretrain  GPT-2 small on real text: steady_came with int8 momentum beside AdamW

Each job is a process of its own, which is ended when its time is up, and appends each
measurement to a file of JSON lines: what was measured survives whatever comes next.
What needs a package that isn't installed is skipped, and says so.

    python benchmarks/accelerator.py --budget-minutes 8
    python benchmarks/accelerator.py --parts values update
    python benchmarks/accelerator.py --resume

The exit code is 1 if anything failed. `accelerator_page.py` makes tables and plots of
the file once it lies in docs/results/accelerator.
"""

import argparse
import collections
import dataclasses
import functools
import importlib
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from measuring import output
from on_accelerator import recorder


@dataclasses.dataclass(frozen=True)
class Job:
    """Something to measure in a process of its own.

    Attributes:
        name: "part" or "part: case".
        module: Of `on_accelerator`, with a function `run`.
        seconds: After which the process is ended; the least worth starting it with is
            a third of that.
        arguments: For `run`, after the recorder.
        environment: Variables to set.
    """

    name: str
    module: str
    seconds: int
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def part(self) -> str:
        """The first word of the name."""
        return self.name.partition(":")[0]


# PyTorch has the device to itself there, and the other process only makes shapes.
NO_DEVICE = {"JAX_PLATFORMS": "cpu"}
# By default JAX takes three quarters of the memory. What it prints when that runs out
# is many pages.
ALL_MEMORY = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95", "TF_CPP_MIN_LOG_LEVEL": "3"}


def _update(model: str, dtype: str, seconds: int) -> Job:
    arguments = {"model": model, "param_dtype": dtype}
    return Job(f"update: {model} {dtype}", "update_times", seconds, arguments)


def _torch(model: str, *optimizers: str, seconds: int) -> Job:
    arguments = {"model": model, "optimizers": optimizers}
    name = f"update: {model} {', '.join(optimizers)}"
    return Job(name, "torch_times", seconds, arguments, NO_DEVICE)


def _step(optimizer: str, seconds: int) -> Job:
    name, arguments = f"step: {optimizer}", {"optimizer": optimizer}
    return Job(name, "training_step", seconds, arguments, ALL_MEMORY)


def _largest(optimizer: str, dtype: str, seconds: int) -> Job:
    arguments = {"optimizer": optimizer, "param_dtype": dtype}
    name = f"largest: {optimizer} {dtype}"
    return Job(name, "largest", seconds, arguments, ALL_MEMORY)


def _pretrain(*optimizers: str, seconds: int) -> Job:
    name, arguments = f"pretrain: {', '.join(optimizers)}", {"optimizers": optimizers}
    return Job(name, "pretraining_run", seconds, arguments, ALL_MEMORY)


TORCH = ("PyTorch AdamW (fused)", "PyTorch CAME")

# What comes last is what a short budget leaves out: after one or two jobs of each part
# come those that complete it.
JOBS = (
    Job("machine", "machine", 45),
    Job("values", "values", 75),
    _update("gpt2-small", "float32", 90),
    _torch("gpt2-small", *TORCH, seconds=45),
    _step("AdamW", 90),
    _step("steady CAME, int8", 60),
    _largest("steady CAME, int8", "bfloat16", 90),
    _pretrain("steady CAME, int8", "AdamW", seconds=270),
    _largest("AdamW", "float32", 90),
    _step("steady CAME, float32", 60),
    _update("bert-large", "bfloat16", 120),
    _update("gpt2-small", "bfloat16", 90),
    _update("bert-large", "float32", 120),
    _torch("bert-large", *TORCH, seconds=45),
    _largest("AdamW", "bfloat16", 90),
    _pretrain("NAdamW", "Adafactor", seconds=270),
    _torch("gpt2-small", "PyTorch CAME, compiled", seconds=120),
)
PARTS = tuple(dict.fromkeys(job.part for job in JOBS[1:]))


def run_in_turn(
    jobs: Iterable[Job],
    path: pathlib.Path,
    size: str,
    deadline: float,
    environment: Mapping[str, str],
) -> None:
    """Runs each job that there is time for in a process of its own."""
    for job in jobs:
        left = deadline - time.monotonic()
        # What only tries the code may be slow.
        seconds = left if size == "nano" else min(job.seconds, left)
        record = recorder.Recorder(path, job.name, size)
        if seconds < job.seconds / 3:
            record.write(skipped=f"{max(left, 0):.0f} s are left of the budget")
            continue
        print(f"\n{job.name}: at most {seconds:.0f} s of {left:.0f} s", flush=True)
        command = [
            *(sys.executable, __file__, "--job", job.name, "--size", size),
            *("--output", str(path), "--seconds", f"{seconds:.0f}"),
        ]
        variables = {**os.environ, **environment, **job.environment}
        try:
            done = subprocess.run(command, env=variables, timeout=seconds)
        except subprocess.TimeoutExpired:
            record.write(failed=f"ended after {seconds:.0f} s")
        else:
            if done.returncode:
                record.write(failed=f"exit code {done.returncode}")


def size_for_this_machine() -> str:
    """Returns "full" where JAX finds an accelerator, "nano" otherwise."""
    command = [sys.executable, "-c", "import jax; print(jax.default_backend())"]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return "nano" if found.split()[-1] == "cpu" else "full"


def check_device(path: pathlib.Path) -> None:
    """Exits unless all rows of a file are of one device."""
    names = {row["device"] for row in recorder.read(path) if "device" in row}
    if len(names) > 1:
        sys.exit(f"{path}: has rows of {' and '.join(names)}; choose another --output")


def run_job(job: Job, record: recorder.Recorder) -> None:
    """Runs one job in this process."""
    module = importlib.import_module(f"on_accelerator.{job.module}")
    module.run(record, **job.arguments)


def summarize(rows: Sequence[Mapping[str, object]]) -> tuple[str, bool]:
    """Returns a table of what each part did, and whether all of it succeeded."""
    counts: dict[str, collections.Counter[str]] = {}
    for row in rows:
        counts.setdefault(str(row["part"]), collections.Counter())[outcome(row)] += 1
    names = ("measured", "failed", "skipped")
    table = output.table(
        [
            {"part": part} | {n: count[n] for n in names}
            for part, count in counts.items()
        ]
    )
    return table, not any(count["failed"] for count in counts.values())


def done(rows: Iterable[Mapping[str, Any]], size: str) -> set[str]:
    """Returns the jobs of a size that came to their end with something measured."""
    found = set()
    for row in rows:
        if row["size"] == size and outcome(row) == "measured":
            found.add(row["job"])
        elif row.keys() <= {"part", "job", "size", "at", "failed", "skipped"}:
            found.discard(row["job"])  # Not one of its cases, but the job.
    return found


def outcome(row: Mapping[str, object]) -> str:
    """Returns whether a row was measured, failed or was skipped."""
    if "failed" in row or row.get("passed") is False:
        return "failed"
    return "skipped" if "skipped" in row else "measured"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=PARTS,
        default=PARTS,
        help="to run after `machine`, which always runs (default: all)",
    )
    parser.add_argument(
        "--size",
        choices=recorder.SIZES,
        help="nano tries the code (default: full, or nano on a CPU)",
    )
    parser.add_argument(
        "--resume", action="store_true", help="leave out jobs that FILE has rows of"
    )
    parser.add_argument("--budget-minutes", type=float, default=7.5, metavar="N")
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        default=output.DEFAULT / "accelerator.jsonl",
        metavar="FILE",
        help="of JSON lines, appended to (default: %(default)s)",
    )
    parser.add_argument(
        "--job",
        choices=[job.name for job in JOBS],
        metavar="NAME",
        help="run this job alone and in this process",
    )
    parser.add_argument("--seconds", type=float, default=600, help="of that job")
    args = parser.parse_args()

    if args.job:
        (job,) = [job for job in JOBS if job.name == args.job]
        run_job(job, recorder.Recorder(args.output, job.name, args.size, args.seconds))
        return
    deadline = time.monotonic() + 60 * args.budget_minutes
    before = len(recorder.read(args.output))
    size = args.size or size_for_this_machine()
    with tempfile.TemporaryDirectory() as cache:
        # What one job tuned and compiled, another need not.
        shared = {} if size == "nano" else {"JAX_COMPILATION_CACHE_DIR": cache}
        run = functools.partial(
            run_in_turn,
            path=args.output,
            size=size,
            deadline=deadline,
            environment=shared,
        )
        run(job for job in JOBS if job.part == "machine")
        check_device(args.output)
        before_that = done(recorder.read(args.output), size) if args.resume else set()
        run(j for j in JOBS if j.part in args.parts and j.name not in before_that)
    table, succeeded = summarize(recorder.read(args.output)[before:])
    print(f"\n{table}\n\n{args.output}")
    sys.exit(0 if succeeded else 1)


if __name__ == "__main__":
    main()

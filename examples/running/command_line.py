"""A script's command line: options in, and one line out when something is wrong."""

import argparse
import contextlib
import dataclasses
import io
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from glob import glob
from pathlib import Path
from typing import Any, NoReturn

import jax
from jsonargparse import (
    ActionConfigFile,
    ArgumentError,
    ArgumentParser,
    DefaultHelpFormatter,
)

from running import folder
from task import UserError


def parse(
    name: str, document: str, groups: Sequence[type], **defaults: Any
) -> list[Any]:
    """Parses the command line into an instance of each option dataclass.

    With --resume, the options that the run was started with are the defaults.

    Args:
        name: Names run folders.
        document: The script's docstring, shown by --help.
        groups: Option dataclasses; `folder.RunOptions` is added as the last.
        **defaults: Values of options whose own default doesn't suit this script.
    """
    *options, run = parse_without_run(
        document, [*groups, folder.RunOptions], **defaults
    )
    if run.resume:
        run = dataclasses.replace(run, output=run.output or str(folder.latest(name)))
        if folder.steps(Path(run.output)):  # Otherwise `folder.claim` says so.
            about = folder.Checkpoints(Path(run.output)).load_about()
            options = parse_without_run(
                document,
                [*groups, folder.RunOptions],
                config=json.dumps(about["options"]),
            )[:-1]
    return [*options, run]


def parse_without_run(
    document: str, groups: Sequence[type], *, config: str | None = None, **defaults: Any
) -> list[Any]:
    """Parses like `parse`, for a script that is no single training run.

    `config` is what --config takes, read before the command line.
    """
    parser = ArgumentParser(
        usage="%(prog)s [options]",
        description=document,
        formatter_class=_Formatter,
        exit_on_error=False,
    )
    parser.add_argument("--config", action=ActionConfigFile, help="File of options.")
    for group in groups:
        parser.add_class_arguments(group, as_group=True)
    parser.set_defaults(defaults)
    fields = [field for group in groups for field in dataclasses.fields(group)]
    lists = [field.name for field in fields if "Sequence" in str(field.type)]
    for argument in sys.argv[1:]:
        if argument != argument.encode(errors="replace").decode():
            raise UserError(f"{argument!a}: not UTF-8")
    arguments = _as_values(sys.argv[1:], lists)
    if config is not None:
        arguments.insert(0, f"--config={config}")
    try:
        values = parser.instantiate(parser.parse_args(arguments))
    except (ArgumentError, TypeError, ValueError) as error:  # Or a rule's own.
        raise UserError(_in_a_line(str(error))) from error
    return [
        group(**{f.name: values[f.name] for f in dataclasses.fields(group)})
        for group in groups
    ]


def run(main: Callable[[], None]) -> NoReturn:
    """Runs a script's main function and exits.

    What is no fault of the program ends in a line that says what is wrong, and the exit
    code 2; or 130 after Ctrl-C while training, which saves. Elsewhere Ctrl-C just ends
    the process: an exception could fall into a destructor.
    """
    for name in ("stdout", "stderr"):  # None in a process started without them.
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))
        if isinstance(stream := getattr(sys, name), io.TextIOWrapper):
            # No encoding has all that texts and names of files have.
            stream.reconfigure(errors="backslashreplace")
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        connect()
        main()
        sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as error:
        reason = _explain(error)
        if reason is None:
            raise
        if isinstance(error, BrokenPipeError):
            # Python flushes it once more on its way out.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        message = "; ".join([reason, *getattr(error, "__notes__", ())])
        with contextlib.suppress(OSError):  # That may be closed too.
            print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr, flush=True)
        sys.exit(130 if isinstance(error, KeyboardInterrupt) else 2)
    sys.exit(0)


@contextlib.contextmanager
def interrupts() -> Iterator[list[int]]:
    """Yields a list that gets the first SIGINT or SIGTERM; a second one kills."""
    received: list[int] = []
    # As shells have it for what they run in the background.
    numbers = [
        n
        for n in (signal.SIGINT, signal.SIGTERM)
        if signal.getsignal(n) != signal.SIG_IGN
    ]
    before = {n: signal.getsignal(n) for n in numbers}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def receive(number: int, frame: Any) -> None:
        received.append(number)
        restore()

    for number in before:
        signal.signal(number, receive)
    try:
        yield received
    finally:
        restore()


def as_config(options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns options as --config takes them."""

    def spec(rule: Any) -> dict[str, Any]:
        module = type(rule).__module__.partition("._")[0]
        name = f"{module}.{type(rule).__name__}"
        return {"class_path": name, "init_args": vars(rule)}

    as_json: dict[str, Any] = json.loads(json.dumps(options, default=spec))
    return as_json


def connect() -> None:
    """Joins the other processes of this run, if there are any; call it first of all.

    Only the first process prints from then on.

    TPU slices and Slurm tell JAX what it needs. Elsewhere JAX_COORDINATOR_ADDRESS
    (host:port of the first process), JAX_NUM_PROCESSES and JAX_PROCESS_ID do.

    Raises:
        UserError: JAX_PLATFORMS asks for devices that are not there, or one of the
            other variables is missing or no such number.
    """
    if "JAX_NUM_PROCESSES" in os.environ:
        processes = _variable("JAX_NUM_PROCESSES", range(1, 2**31))
        index = _variable("JAX_PROCESS_ID", range(processes))
        address = os.environ.get("JAX_COORDINATOR_ADDRESS", "")
        host, _, port = address.rpartition(":")
        if not (host and port.isdecimal() and int(port) in range(1, 2**16)):
            raise UserError(
                f"JAX_COORDINATOR_ADDRESS={address}: must be a host:port, of the first "
                "process"
            )
        jax.distributed.initialize(num_processes=processes, process_id=index)
    elif _is_slurm_task() or _has_tpu():
        jax.distributed.initialize()
    if platforms := os.environ.get("JAX_PLATFORMS"):
        try:
            jax.default_backend()
        except (RuntimeError, AssertionError) as error:  # CUDA without a GPU asserts.
            reason = " ".join(str(error).split())[:200] or "there is no such device"
            raise UserError(f"JAX_PLATFORMS={platforms}: {reason}") from error
    if jax.distributed.is_initialized() and jax.process_index() > 0:
        sys.stdout = open(os.devnull, "w")


class _Formatter(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Keeps the lines of a script's docstring."""


def _as_values(arguments: Sequence[str], lists: Sequence[str]) -> list[str]:
    """Spells options as the parser reads them: --a-b c d as --a_b=["c", "d"].

    Alone --a is --a=true, and --no-a is --a=false.
    """
    spelled: list[str] = []
    for option in re.split(r"\0(?=--)", "\0".join(arguments)) if arguments else []:
        first, *values = option.split("\0")
        name, equals, value = first.partition("=")
        if not name.startswith("--"):
            spelled += [first, *values]
            continue
        values = [value, *values] if equals else values
        name = "--" + name[2:].replace("-", "_")
        if name[2:] in lists:
            spelled.append(f"{name}={json.dumps(values)}")
        elif values:
            spelled += [f"{name}={values[0]}", *values[1:]]
        elif name in ("--help", "--print_config"):
            spelled.append(name)
        elif name.startswith("--no_"):
            spelled.append(f"--{name[5:]}=false")
        else:
            spelled.append(f"{name}=true")
    return spelled


def _in_a_line(message: str) -> str:
    """Returns the option, its value and what is allowed, of the parser's message."""
    key = re.search(r'Parser key "([^"]*)"', message)
    value = re.search(r"Given value: (.*)", message)
    reasons = re.findall(r"^ +- (.*)", message, re.MULTILINE)
    wrong = [reason for reason in reasons if "NoneType" not in reason]
    if key is None:
        return " ".join(message.split()) + "; see --help"
    text = " ".join("; ".join(wrong or [message[key.end() :]]).split()).lstrip(": ")
    option = f"--{key[1].replace('_', '-')}{f' {value[1]}' if value else ''}"
    return f"{option}: {text}"


def _explain(error: BaseException) -> str | None:
    """Returns one line for the user, None for what a programmer has to look at."""
    text = " ".join(str(error).split())
    if isinstance(error, UserError):
        return text
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, BrokenPipeError) and error.filename is None:
        return "nobody reads what this prints any more"
    if isinstance(error, OSError) and error.errno is not None:
        return f"{error.filename or 'file'}: {error.strerror}"
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text:
        return f"out of memory, with this model and batch: {text[:200]}"
    return None


def _variable(name: str, allowed: range) -> int:
    text = os.environ.get(name, "")
    if not text.isdecimal() or int(text) not in allowed:
        raise UserError(
            f"{name}={text}: must be a whole number from {allowed[0]} to {allowed[-1]}"
        )
    return int(text)


def _is_slurm_task() -> bool:
    """Whether `srun` started this: a shell of an allocation has not all of these."""
    task = {"SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID"} <= os.environ.keys()
    return task and int(os.environ.get("SLURM_NTASKS", 1)) > 1


def _has_tpu() -> bool:
    chips = glob("/dev/accel[0-9]*") + glob("/dev/vfio/[0-9]*")
    return bool(chips) and "tpu" in os.environ.get("JAX_PLATFORMS", "tpu")

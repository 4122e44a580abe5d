"""Command lines made from option dataclasses; one dataclass is one group of --help.

`tyro` does as much from the same dataclasses, but takes numbers out of range unless
each type says otherwise, and tells a wrong one in a box of seven lines.
"""

import argparse
import contextlib
import dataclasses
import io
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from pretraining.errors import UserError
from pretraining.training import interrupts, runs
from pretraining.training.devices import connect


def parse(
    name: str,
    document: str,
    groups: Sequence[type],
    argv: Sequence[str] | None = None,
    *,
    defaults: Mapping[str, Any] | None = None,
) -> list[Any]:
    """Parses the command line into an instance of each option dataclass.

    With --resume, the options that the run was started with are the defaults.

    Args:
        name: Names run folders.
        document: The script's docstring, shown by --help.
        groups: Option dataclasses, titled by their docstrings: "Options for ...".
            `runs.RunOptions` is added as the last.
        argv: The arguments, by default the process's.
        defaults: Values of options whose own default doesn't suit this script.
    """
    groups = [*groups, runs.RunOptions]
    parser = _make_parser(document, groups, defaults or {})
    args = parser.parse_args(argv)
    if args.resume:
        from pretraining.training.checkpoints import Checkpoints  # Slow to import.

        folder = Path(args.output or runs.latest(name))
        if runs.steps(folder):  # Otherwise `runs.claim` says so.
            parser.set_defaults(**Checkpoints(folder).load_about()["options"])
            args = parser.parse_args(argv)
        args.output = str(folder)
    return _instances(groups, args)


def parse_without_run(
    document: str, groups: Sequence[type], argv: Sequence[str] | None = None
) -> list[Any]:
    """Parses like `parse`, for a script that is no single training run."""
    return _instances(groups, _make_parser(document, groups, {}).parse_args(argv))


def run(main: Callable[[], None]) -> NoReturn:
    """Runs a script's main function and exits.

    What is no fault of the program ends in a line that says what is wrong, and the exit
    code 2; or 130 after Ctrl-C.
    """
    for name in ("stdout", "stderr"):  # None in a process started without them.
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))
        if isinstance(stream := getattr(sys, name), io.TextIOWrapper):
            # No encoding has all that texts and names of files have.
            stream.reconfigure(errors="backslashreplace")
    try:
        # Then all has been said, and may end without a word.
        with interrupts.quit_on_ctrl_c(afterwards=signal.SIG_DFL):
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
    if isinstance(error, RuntimeError) and "initialize backend" in text:
        return f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}: {text[:200]}"
    return None


def _make_parser(
    document: str, groups: Sequence[type], defaults: Mapping[str, Any]
) -> argparse.ArgumentParser:
    parser = _Parser(
        usage="%(prog)s [options]",
        description=document,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
            prog, max_help_position=32
        ),
    )
    for group in groups:
        arguments = parser.add_argument_group(_title(group))
        for field in dataclasses.fields(group):
            keywords = dict(field.metadata)
            default = defaults.get(field.name, field.default)
            if default not in (None, False, ""):
                keywords["help"] += " (default: %(default)s)"
            flag = "--" + field.name.replace("_", "-")
            arguments.add_argument(flag, default=default, **keywords)
    return parser


def _instances(groups: Sequence[type], args: argparse.Namespace) -> list[Any]:
    return [
        group(**{f.name: getattr(args, f.name) for f in dataclasses.fields(group)})
        for group in groups
    ]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see --help\n")


def _title(group: type) -> str:
    return (group.__doc__ or "").removeprefix("Options for ").removesuffix(".")

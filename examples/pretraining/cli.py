"""Command lines made from option dataclasses; one dataclass is one group of --help."""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from pretraining.errors import Interrupted, UserError
from pretraining.training import runs
from pretraining.training.devices import connect, first_says


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

        output = Path(args.output or runs.latest(name))
        runs.prepare(output, resume=True)
        options = Checkpoints(output, read_only=True).load_about()["options"]
        parser.set_defaults(**options, output=str(output))
        args = parser.parse_args(argv)
    elif args.output is None:
        args.output = first_says(str(runs.next_free(name)))
    return _instances(groups, args)


def parse_without_run(
    document: str, groups: Sequence[type], argv: Sequence[str] | None = None
) -> list[Any]:
    """Parses like `parse`, for a script that is no single training run."""
    return _instances(groups, _make_parser(document, groups, {}).parse_args(argv))


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


def run(main: Callable[[], None]) -> NoReturn:
    """Runs a script's main function and exits: 2 for the user's errors."""
    script = Path(sys.argv[0])
    connect()
    try:
        main()
    except UserError as error:
        _exit(2, f"{script.name}: {' '.join(str(error).split())}")
    except OSError as error:
        if error.errno is None:
            raise
        _exit(2, f"{script.name}: {error.filename or 'file'}: {error.strerror}")
    except Interrupted as interrupted:
        _exit(
            130,
            f"{interrupted}\n"
            f"Continue: python {script} --resume --output {interrupted.folder}",
        )
    except KeyboardInterrupt:
        _exit(130, f"\n{script.name}: interrupted")
    sys.exit(0)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see --help\n")


def _title(group: type) -> str:
    return (group.__doc__ or "").removeprefix("Options for ").removesuffix(".")


def _exit(code: int, message: str) -> NoReturn:
    print(message, file=sys.stderr)
    sys.exit(code)

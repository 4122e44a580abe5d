"""Fields of dataclasses that are command-line options too."""

import argparse
import dataclasses
import math
from collections.abc import Callable
from typing import Any

LARGEST = 2**31 - 1  # Of what JAX counts in int32.


def option(default: Any, help: str, **kwargs: Any) -> Any:
    """A dataclass field that is also a command-line option.

    Args:
        default: The default; False makes a switch, and so does the type `bool`.
        help: A line for --help.
        **kwargs: More for `argparse.ArgumentParser.add_argument`, e.g. type or choices.
    """
    if default is False or kwargs.get("type") is bool:
        kwargs.pop("type", None)
        kwargs["action"] = argparse.BooleanOptionalAction
    elif "choices" not in kwargs:
        kwargs.setdefault("metavar", _METAVARS.get(kwargs.get("type"), "TEXT"))
    return dataclasses.field(default=default, metadata=kwargs | {"help": help})


def utf8(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # From bytes that are none.
        raise argparse.ArgumentTypeError(f"{text!a} is not UTF-8") from error
    return text


def positive_int(text: str) -> int:
    return _number(int, text, lambda n: 0 < n <= LARGEST, f"from 1 to {LARGEST:,}")


def non_negative_int(text: str) -> int:
    return _number(int, text, lambda n: 0 <= n <= LARGEST, f"from 0 to {LARGEST:,}")


def vocabulary_size(text: str) -> int:
    return _number(int, text, lambda n: 0 < n <= 10**6, "from 1 to 1,000,000")


def positive_float(text: str) -> float:
    return _number(float, text, lambda x: 0 < x < math.inf, "a number above 0")


def non_negative_float(text: str) -> float:
    return _number(float, text, lambda x: 0 <= x < math.inf, "0 or a number above it")


def decay_rate(text: str) -> float:
    return _number(float, text, lambda x: 0 <= x < 1, "a number from 0 to below 1")


_METAVARS = {
    int: "N",
    positive_int: "N",
    non_negative_int: "N",
    vocabulary_size: "N",
    positive_float: "X",
    non_negative_float: "X",
    decay_rate: "X",
}


def _number(
    kind: type, text: str, allowed: Callable[[Any], bool], description: str
) -> Any:
    try:
        number = kind(text)
    except ValueError:
        number = None
    if number is None or not allowed(number):
        noun = {int: "a whole number ", float: ""}[kind]
        raise argparse.ArgumentTypeError(f"{text!r} is not {noun}{description}")
    return number

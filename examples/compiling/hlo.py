"""Reads the optimised HLO text of a compiled program: computations and instructions."""

import dataclasses
import math
import re

HEADER = re.compile(r"(ENTRY )?(%\S+) \(.*\{$")
NAME = re.compile(r"\s+(?:ROOT )?(%\S+) = ")
ARRAY = re.compile(r"([a-z][a-z0-9]*)\[([0-9,]*)\](?:\{([^}]*)\})?")
ON_CHIP = re.compile(r"S\([1-9]\d*\)")
# Bits of the dtypes whose names don't say.
BITS = {"pred": 8, "token": 0, "opaque": 0}


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
        name: Its name, with the %.
        opcode: What it does, such as "fusion".
        result: The type of its result, which may be a tuple's.
        operands: The names of what it takes.
    """

    name: str
    opcode: str
    result: str
    operands: tuple[str, ...]


def computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    """Returns the lines of each computation of a module, and the entry's name.

    Raises:
        ValueError: There is no entry.
    """
    found: dict[str, list[str]] = {}
    entry = lines = None
    for line in hlo.splitlines():
        if header := HEADER.match(line):
            lines = found.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif line == "}":
            lines = None
        elif lines is not None:
            lines.append(line)
    if entry is None:
        raise ValueError("no ENTRY computation in this HLO text")
    return found, entry


def instruction(line: str) -> Instruction:
    """Reads a line of a computation.

    Raises:
        ValueError: It is none.
    """
    found = NAME.match(line)
    if found is None:
        raise ValueError(f"cannot read the HLO line {line!r}")
    rest = re.sub(r"/\*.*?\*/", "", line[found.end() :])
    result, rest = _split_type(rest)
    opcode, rest = rest.split("(", 1)
    operands = re.findall(r"%[^\s,()]+", _until_closing(rest))
    return Instruction(found[1], opcode.strip(), result, tuple(operands))


def array_sizes(types: str, *, on_chip: bool = True) -> tuple[int, ...]:
    """Returns the bytes of each array in a type.

    Args:
        types: Such as "(f32[8,128]{1,0}, s4[8,128]{1,0})".
        on_chip: Whether to count arrays in a TPU's own memory, VMEM; they count 0 if
            not.
    """
    return tuple(
        math.prod(int(n) for n in shape.split(",") if n) * _bits(dtype) // 8
        if on_chip or not ON_CHIP.search(layout)
        else 0
        for dtype, shape, layout in ARRAY.findall(types)
    )


def _split_type(text: str) -> tuple[str, str]:
    """Splits `text` behind the type it starts with, which may be a tuple."""
    if not text.startswith("("):
        result, rest = text.split(" ", 1)
        return result, rest
    inside = _until_closing(text[1:])
    return inside, text[len(inside) + 2 :]


def _until_closing(text: str) -> str:
    """Returns what stands before the parenthesis that closes an open one."""
    depth = 1
    for i, char in enumerate(text):
        depth += {"(": 1, ")": -1}.get(char, 0)
        if depth == 0:
            return text[:i]
    raise ValueError(f"unbalanced parentheses in {text!r}")


def _bits(dtype: str) -> int:
    if dtype in BITS:
        return BITS[dtype]
    digits = re.search(r"\d+", dtype)
    assert digits is not None, dtype
    return int(digits[0])

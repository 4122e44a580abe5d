"""Memory traffic of a compiled program, counted in its optimised HLO text.

A kernel reads each operand from and writes each result to high-bandwidth memory (HBM)
once, which for elementwise fusions and reductions of arrays larger than the caches is
what happens. What a TPU keeps on chip is free: XLA says so in the layout, as in
``f32[768,3072]{1,0:T(8,128)S(1)}``. Copies into and out of such a buffer are what
reads and writes HBM then. XLA's own ``cost_analysis()`` counts those buffers too.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

# Bits of the dtypes whose names don't say.
BITS = {"pred": 8, "token": 0, "opaque": 0}

# They launch nothing: names for buffers, or the second half of an asynchronous pair.
FREE = {
    "add-dependency",
    "after-all",
    "bitcast",
    "constant",
    "copy-done",
    "get-tuple-element",
    "optimization-barrier",
    "parameter",
    "slice-done",
    "tuple",
}

INSTRUCTION = re.compile(r"\s+(?:ROOT )?(%\S+) = ")
ARRAY = re.compile(r"([a-z][a-z0-9]*)\[([0-9,]*)\](?:\{([^}]*)\})?")
ON_CHIP = re.compile(r"S\([1-9]\d*\)")


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What one run of a compiled program does.

    Attributes:
        hbm_bytes: Bytes read from and written to HBM.
        kernels: Instructions launched, asynchronous copies aside.
    """

    hbm_bytes: int
    kernels: int


@dataclasses.dataclass(frozen=True)
class _Instruction:
    opcode: str
    result: str  # Its type.
    operands: tuple[str, ...]


def traffic(hlo: str) -> Traffic:
    """Counts the traffic of the entry computation of an optimised HLO module.

    Raises:
        ValueError: The program loops or branches, so that its text does not tell how
            often an instruction runs.
    """
    instructions = dict(_entry_computation(hlo))
    hbm_bytes = kernels = 0
    for instruction in instructions.values():
        opcode, result = instruction.opcode, instruction.result
        if opcode in ("while", "conditional", "call"):
            raise ValueError(f"cannot count the traffic of a {opcode}")
        if opcode in FREE:
            continue
        operands = [instructions[name].result for name in instruction.operands]
        if opcode in ("copy-start", "slice-start"):
            # The result holds the destination and the source, in either order.
            first, second, *_ = ARRAY.finditer(result)
            target = first if opcode == "copy-start" else second
            moved = min(_bytes(first[0], on_chip=True), _bytes(second[0], on_chip=True))
            hbm_bytes += moved * sum(_bytes(t) > 0 for t in (operands[0], target[0]))
            continue
        hbm_bytes += sum(_bytes(types) for types in (result, *operands))
        kernels += 1
    return Traffic(hbm_bytes, kernels)


def _entry_computation(hlo: str) -> Iterator[tuple[str, _Instruction]]:
    """Yields the names and the instructions of the entry computation."""
    lines = iter(hlo.splitlines())
    next(line for line in lines if line.startswith("ENTRY"))
    for line in lines:
        if line == "}":
            return
        found = INSTRUCTION.match(line)
        if found is None:
            raise ValueError(f"cannot read the HLO line {line!r}")
        rest = re.sub(r"/\*.*?\*/", "", line[found.end() :])
        result, rest = _split_type(rest)
        opcode, rest = rest.split("(", 1)
        operands = re.findall(r"%[^\s,()]+", _until_closing(rest))
        yield found[1], _Instruction(opcode.strip(), result, tuple(operands))


def _split_type(text: str) -> tuple[str, str]:
    """Splits ``text`` behind the type it starts with, which may be a tuple."""
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


def _bytes(types: str, on_chip: bool = False) -> int:
    """Returns the bytes of a type's arrays in HBM, and ``on_chip`` if wanted."""
    return sum(
        math.prod(int(n) for n in shape.split(",") if n) * _bits(dtype) // 8
        for dtype, shape, layout in ARRAY.findall(types)
        if on_chip or not ON_CHIP.search(layout)
    )


def _bits(dtype: str) -> int:
    if dtype in BITS:
        return BITS[dtype]
    digits = re.search(r"\d+", dtype)
    assert digits is not None, dtype
    return int(digits[0])

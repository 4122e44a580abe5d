"""Memory traffic of a compiled program, counted in its optimised HLO text.

A kernel reads each operand from and writes each result to high-bandwidth memory (HBM)
once, which for elementwise fusions and reductions of arrays larger than the caches is
what happens. What a TPU keeps on chip is free: XLA says so in the layout, as in
``f32[768,3072]{1,0:T(8,128)S(1)}``. Copies into and out of such a buffer are what
reads and writes HBM then. XLA's own ``cost_analysis()`` counts those buffers too.
"""

import dataclasses

from compiling.hlo import ARRAY, array_sizes, computations, instruction

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


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What one run of a compiled program does.

    Attributes:
        hbm_bytes: Bytes read from and written to HBM.
        kernels: Instructions launched, asynchronous copies aside.
    """

    hbm_bytes: int
    kernels: int


def traffic(hlo: str) -> Traffic:
    """Counts the traffic of the entry computation of an optimised HLO module.

    Raises:
        ValueError: The program loops or branches, so that its text does not tell how
            often an instruction runs.
    """
    lines, entry = computations(hlo)
    found = {one.name: one for one in map(instruction, lines[entry])}
    hbm_bytes = kernels = 0
    for one in found.values():
        if one.opcode in ("while", "conditional", "call"):
            raise ValueError(f"cannot count the traffic of a {one.opcode}")
        if one.opcode in FREE:
            continue
        operands = [found[name].result for name in one.operands]
        if one.opcode in ("copy-start", "slice-start"):
            # The result holds the destination and the source, in either order.
            first, second, *_ = (array[0] for array in ARRAY.finditer(one.result))
            target = first if one.opcode == "copy-start" else second
            moved = min(sum(array_sizes(first)), sum(array_sizes(second)))
            hbm_bytes += moved * sum(_in_hbm(t) > 0 for t in (operands[0], target))
            continue
        hbm_bytes += sum(_in_hbm(types) for types in (one.result, *operands))
        kernels += 1
    return Traffic(hbm_bytes, kernels)


def _in_hbm(types: str) -> int:
    return sum(array_sizes(types, on_chip=False))

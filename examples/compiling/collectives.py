"""What a compiled program sends between chips, read from its optimised HLO text."""

import dataclasses
import re

from compiling.hlo import array_sizes, computations

KINDS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)

# Those whose start has the type of (operands, results).
STARTED_WITH_OPERANDS = ("all-gather", "all-to-all", "reduce-scatter")

COLLECTIVE = re.compile(rf" = (.*?) ({'|'.join(KINDS)})(-start)?\(")
CHANNEL = re.compile(r"channel_id=(\d+)")
CALLED = re.compile(r"(?:calls|to_apply|body)=(%[^\s,)]+)")
BRANCHES = re.compile(r"branch_computations=\{(.*?)\}")
LOOP = re.compile(r" while\(.*condition=(%[^\s,)]+)")
KNOWN_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
LIMIT = re.compile(r" = [su]32\[\]\S* constant\((\d+)\)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation, which may move many arrays at once.

    Attributes:
      kind: one of ``KINDS``.
      arrays: the sizes in bytes of the arrays that it gives each device.
      times: how often it runs, because of the loops that it is in.
    """

    kind: str
    arrays: tuple[int, ...]
    times: int

    @property
    def bytes(self) -> int:
        """Bytes received by each device, in all the times that it runs."""
        return sum(self.arrays) * self.times


def collectives(hlo: str) -> list[Collective]:
    """Lists the collectives of an optimised HLO module, each once.

    TPUs run a collective in steps spread over other kernels, so that it appears several
    times under one channel. All branches of a conditional count.

    Raises:
      ValueError: a loop's text does not tell how often it runs.
    """
    lines, entry = computations(hlo)
    found = []
    seen = set()

    def visit(name: str, times: int) -> None:
        for line in lines[name]:
            if match := COLLECTIVE.search(line):
                channel = CHANNEL.search(line)
                if channel is None or channel[1] not in seen:
                    seen.add(channel and channel[1])
                    arrays = array_sizes(match[1])
                    if match[3] and match[2] in STARTED_WITH_OPERANDS:
                        arrays = arrays[len(arrays) // 2 :]
                    elif match[3] and match[2] == "collective-permute":
                        arrays = arrays[1:2]  # (operand, result, contexts)
                    found.append(Collective(match[2], arrays, times))
            inside = times
            if loop := LOOP.search(line):
                inside *= _trips(line, lines[loop[1]])
            called = CALLED.findall(line)
            for branches in BRANCHES.findall(line):
                called += [branch.strip() for branch in branches.split(",")]
            for callee in called:
                visit(callee, inside)

    visit(entry, 1)
    return found


def _trips(loop: str, condition: list[str]) -> int:
    """Returns how often a while loop runs, counting from 0 as ``lax.scan`` does."""
    if known := KNOWN_TRIPS.search(loop):
        return int(known[1])
    limits = [int(match[1]) for line in condition if (match := LIMIT.search(line))]
    if len(limits) != 1:
        raise ValueError(f"cannot tell how often the loop runs: {loop.strip()[:200]}")
    return limits[0]

"""What the conversion of a state does, in the words of a table."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from came_optax._alignment import Part
from came_optax._paths import KeyPath, owner, path_name


@dataclasses.dataclass(frozen=True)
class ConversionReport:
    """What :func:`convert_state` does to a state; ``print`` shows it as a table.

    Parts are named by their class and place in the state, as in
    ``"ScaleByCameState at '0'"``, single arrays by their path.

    Attributes:
      kept: parts of the new state, and those of the old that they are, to the last bit.
      converted: parts of the new state, and those of the old that they are made of.
      anew: what only the new state has.
      dropped: what only the old state has.
    """

    kept: Mapping[str, str]
    converted: Mapping[str, str]
    anew: tuple[str, ...]
    dropped: tuple[str, ...]

    def __str__(self) -> str:
        """Returns a table of the new state's parts and what else the old one has."""
        rows = [
            *(("kept", name, "is", of) for name, of in self.kept.items()),
            *(("converted", name, "from", of) for name, of in self.converted.items()),
            *(("anew", name, "", "") for name in self.anew),
            *(("dropped", "", "", name) for name in self.dropped),
        ]
        rows.insert(0, ("", "new state", "", "old state"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(f"{x:<{n}}" for x, n in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        if self.anew or self.dropped:
            lines.append("convert_state does this with strict=False only")
        return "\n".join(lines)


def names_of(
    owned: Sequence[Part], arrays: set[KeyPath], params: Mapping[KeyPath, Any]
) -> tuple[str, ...]:
    """Returns what arrays are called: whole parts, of a parameter, or alone."""
    names: dict[str, None] = {}  # In order.
    for part in owned:
        left = [path for path in part.arrays if part.path + path in arrays]
        if len(left) == len(part.arrays):
            names[str(part)] = None
            continue
        for path in left:
            param, _ = owner(path, params)
            of = path_name(path) if param is None else path_name(param)
            names[f"{of!r} of {part}"] = None
    return tuple(names)

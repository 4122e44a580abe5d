"""Where benchmarks write what they measured."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from measuring import ROOT
from measuring.examples import of_columns, replacing

DEFAULT = ROOT / "benchmarks" / "results"


def replace(path: pathlib.Path, text: str) -> None:
    """Writes a file that is whole whenever the process ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def write(
    directory: pathlib.Path,
    name: str,
    rows: Sequence[Mapping[str, Any]],
    **facts: Any,
) -> None:
    """Prints rows as a table, and writes them as Markdown and, with facts, as JSON."""
    text = of_columns(rows)
    print(text)
    replace(directory / f"{name}.md", text)
    result = json.dumps(facts | {"rows": rows}, indent=2, ensure_ascii=False)
    replace(directory / f"{name}.json", result)

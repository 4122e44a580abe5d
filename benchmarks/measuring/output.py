"""Where benchmarks write what they measured."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from measuring import ROOT
from measuring.examples import of_columns

DEFAULT = ROOT / "benchmarks" / "results"


def write(
    directory: pathlib.Path,
    name: str,
    rows: Sequence[Mapping[str, Any]],
    **facts: Any,
) -> None:
    """Prints rows as a table, and writes them as Markdown and, with facts, as JSON."""
    text = of_columns(rows)
    print(text)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{name}.md").write_text(text + "\n", encoding="utf-8")
    result = json.dumps(facts | {"rows": rows}, indent=2, ensure_ascii=False)
    (directory / f"{name}.json").write_text(result + "\n", encoding="utf-8")

"""What was measured on a device so far: a table and a JSON file, always whole."""

import json
import pathlib
import time
from typing import Any

from measuring import output
from measuring.examples import of_columns
from measuring.updates import BASELINE

COLUMNS = (
    "error",
    "rounded otherwise",
    "update (ms)",
    "to AdamW",
    "bytes/parameter",
    "GB/s",
    "of a copy's",
    "state (MB)",
    "temporaries (MB)",
    "step (ms)",
    "tokens/s",
    "step needs (GB)",
)


class Measurements:
    """What was measured so far, on disk too.

    Attributes:
        facts: About the device.
        rows: By optimizer, of any of `COLUMNS`.
        failed: What went wrong, in a line each.
    """

    def __init__(self, folder: pathlib.Path, **facts: Any):
        self.folder, self.facts = folder, facts
        self.rows: dict[str, dict[str, Any]] = {}
        self.failed: list[str] = []
        self._began = time.monotonic()

    def add(self, optimizer: str, **measured: Any) -> None:
        """Adds to an optimizer's row, prints it, and writes all."""
        row = self.rows.setdefault(optimizer, {})
        row.update(measured)
        if "update (ms)" in self.rows.get(BASELINE, {}):
            for other in self.rows.values():
                if "update (ms)" in other:
                    base = self.rows[BASELINE]["update (ms)"]
                    other["to AdamW"] = round(other["update (ms)"] / base, 3)
        self.write(optimizer, measured)

    def fail(self, what: str, error: object) -> None:
        """Adds a failure, in a line of bounded length."""
        self.failed.append(f"{what}: {' '.join(str(error).split())[:300]}")
        self.write("failed", self.failed[-1])

    def write(self, *news: object) -> None:
        """Prints the news, and writes both files."""
        print(f"[{time.monotonic() - self._began:5.0f} s]", *news, flush=True)
        rows = [{"optimizer": name} | row for name, row in self.rows.items()]
        everything = self.facts | {"failed": self.failed, "rows": rows}
        text = json.dumps(everything, indent=1)
        output.replace(self.folder / "accelerator.json", text)
        output.replace(self.folder / "accelerator.md", self.table())

    def table(self) -> str:
        """Returns the device and all rows, in Markdown."""
        columns = [c for c in COLUMNS if any(c in row for row in self.rows.values())]
        device = self.facts["device"]
        lines = [f"{device}; a copy moves {self.facts.get('copy GB/s', '?')} GB/s."]
        if self.rows:
            cells = [
                {device: name} | {c: row.get(c, "") for c in columns}
                for name, row in self.rows.items()
            ]
            lines += ["", of_columns(cells)]
        return "\n".join([*lines, *(f"\nFailed: {line}" for line in self.failed)])

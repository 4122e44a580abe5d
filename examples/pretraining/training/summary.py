"""What a run achieved and what its optimizer took."""

import dataclasses
from collections.abc import Mapping

from pretraining.table import format_table


@dataclasses.dataclass(frozen=True)
class Result:
    """The outcome of a run, also written to summary.json.

    Attributes:
        optimizer: Its name.
        steps: Updates made.
        tokens: Tokens trained on.
        seconds: Time since this process began to train, evaluations included.
        loss: Mean training loss of the last steps logged, None if no log is left.
        validation: Metrics on all held-out records.
        references: Losses to compare with.
        parameters: Their number.
        optimizer_bytes: Bytes of optimizer state.
        adamw_bytes: What AdamW would take for the same parameters.
    """

    optimizer: str
    steps: int
    tokens: int
    seconds: float
    loss: float | None
    validation: Mapping[str, float]
    references: Mapping[str, float]
    parameters: int
    optimizer_bytes: int
    adamw_bytes: int

    def __str__(self) -> str:
        """Returns a table."""
        rows = []
        if self.loss is not None:
            rows += [("training loss", f"{self.loss:.3f}")]
        rows += [(f"validation {k}", f"{v:.3f}") for k, v in self.validation.items()]
        rows += [(f"  {k}", f"{v:.3f}") for k, v in self.references.items()]
        minutes, seconds = divmod(round(self.seconds), 60)
        rows += [
            ("tokens", f"{self.tokens:,} in {self.steps:,} steps"),
            ("time", f"{minutes} min {seconds:02d} s"),
            ("parameters", f"{self.parameters:,}"),
            (f"{self.optimizer} state", self._memory(self.optimizer_bytes)),
            ("  adamw state", self._memory(self.adamw_bytes)),
        ]
        return format_table(rows, "<<")

    def _memory(self, size: int) -> str:
        return f"{size:,} bytes, {size / self.parameters:.2f} per parameter"

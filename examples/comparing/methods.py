"""The optimizers that are compared: an update rule with settings and warmup each."""

import dataclasses
from typing import Any

from pretraining.training.optimizers import OptimizerOptions


@dataclasses.dataclass(frozen=True)
class Method:
    """One row of the comparison.

    Attributes:
        label: For tables and plots.
        options: Of the optimizer. `learning_rate` is where the search begins.
        warmup: Part of the steps spent in warmup.
        param_dtype: In which parameters are stored; updates of narrower ones than
            float32 are rounded stochastically.
    """

    label: str
    options: OptimizerOptions
    warmup: float = 0.1
    param_dtype: str = "float32"


def _method(
    label: str,
    optimizer: str,
    learning_rate: float,
    warmup: float = 0.1,
    **options: Any,
) -> Method:
    options |= {"optimizer": optimizer, "learning_rate": learning_rate}
    return Method(label, OptimizerOptions(**options), warmup)


def _came(
    label: str, learning_rate: float = 1e-3, warmup: float = 0.1, **options: Any
) -> Method:
    return _method(label, "published-came", learning_rate, warmup, **options)


COMPARISON = {
    "adamw": _method("AdamW", "adamw", 3e-3),
    "nadamw": _method("NAdamW", "nadamw", 3e-3),
    "adafactor": _method("Adafactor", "adafactor", 3e-3),
    "came": _came("CAME"),
    "came-bc": _came("CAME, bias-corrected", 3e-3, bias_correction=True),
    "came-bc-clip-1": _came(
        "CAME, bias-corrected, update clip 1",
        3e-3,
        bias_correction=True,
        update_clipping_threshold=1.0,
    ),
    "adamw-b2-0.999": _method("AdamW, β2 0.999", "adamw", 3e-3, b2=0.999),
    "adafactor-b1-0": _method("Adafactor, no momentum", "adafactor", 3e-3, b1=0.0),
    "lion": _method("Lion", "lion", 3e-4),
    "muon": _method("Muon", "muon", 1e-2),
}

RECOMMENDED = {
    "b2": 0.95,
    "eps2": 0.1,
    "bias_correction": True,
    "update_clipping_threshold": 1.0,
}
AS_RECOMMENDED = "came-bc-b2-0.95-eps2-0.1-clip-1"

STUDY = {
    AS_RECOMMENDED: _came("CAME, recommended", 3e-3, **RECOMMENDED),
    "came-bc-b2-0.95-clip-1": _came(
        "CAME, bias-corrected, β2 0.95, update clip 1",
        3e-3,
        bias_correction=True,
        b2=0.95,
        update_clipping_threshold=1.0,
    ),
    "came-clip-1": _came("CAME, update clip 1", 3e-3, update_clipping_threshold=1.0),
    "came-b2-0.95-b3-0.995": _came("CAME, β2 0.95, β3 0.995", b2=0.95, b3=0.995),
    "came-bc-b2-0.95-b3-0.995": _came(
        "CAME, bias-corrected, β2 0.95, β3 0.995",
        3e-3,
        bias_correction=True,
        b2=0.95,
        b3=0.995,
    ),
    "came-warmup-0": _came("CAME, no warmup", warmup=0.0),
    "came-warmup-2": _came("CAME, warmup 2 %", warmup=0.02),
    "came-b3-0.999": _came("CAME, β3 0.999", b3=0.999),
    "came-b3-0.9995": _came("CAME, β3 0.9995", b3=0.9995),
    "came-clip-0.5": _came(
        "CAME, update clip 0.5", 3e-3, update_clipping_threshold=0.5
    ),
    "came-clip-2": _came("CAME, update clip 2", 3e-3, update_clipping_threshold=2.0),
}

STORAGE = {
    f"came-{mu_dtype}": _came(
        f"CAME, recommended, {mu_dtype} momentum",
        3e-3,
        **RECOMMENDED,
        mu_dtype=mu_dtype,
    )
    for mu_dtype in ("bfloat16", "int8", "int4")
}
STORAGE["came-int8-bfloat16-params"] = dataclasses.replace(
    STORAGE["came-int8"],
    label="CAME, recommended, int8 momentum, bfloat16 parameters",
    param_dtype="bfloat16",
)

METHODS = COMPARISON | STUDY | STORAGE

"""Draws docs/figures/loss_against_memory.svg: what each byte of state buys.

From the logs of `examples/compare_optimizers.py` in docs/results/gpt2-nano:

    python docs/figures/loss_against_memory.py
"""

import pathlib
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from dynamics import STYLE

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples"))
from comparing.summary import summarize  # noqa: E402

RESULTS = ROOT / "docs" / "results" / "gpt2-nano"
# Marker, and where the label stands, in points from the marker.
METHODS = {
    "adamw": ("AdamW, β2 0.95", "s", (-56, 4)),
    "adamw-b2-0.999": ("AdamW, β2 0.999", "s", (-60, -6)),
    "muon": ("Muon", "D", (30, 0)),
    "adafactor": ("Adafactor,\nmomentum 0.9", "^", (-48, -10)),
    "adafactor-b1-0": ("Adafactor,\nno momentum", "^", (38, -40)),
    "came": ("CAME,\nas published", "o", (48, 0)),
    "came-bc-b2-0.95-eps2-0.1-clip-1": ("CAME,\nfloat32", "o", (36, 6)),
    "came-bfloat16": ("CAME,\nbfloat16", "o", (0, 30)),
    "came-int8": ("CAME,\nint8", "o", (24, -24)),
    "came-int4": ("CAME,\nint4", "o", (-8, 24)),
}


def main():
    figure, axes = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
    for name, (label, marker, offset) in METHODS.items():
        summary = summarize(RESULTS, name)
        finals = summary.finals()
        x, y = summary.cost["state_bytes_per_parameter"], finals.mean()
        color = "#d55e00" if name.startswith("came") else "#0072b2"
        axes.errorbar(
            x, y, finals.std(ddof=1), fmt=marker, color=color, markersize=8, capsize=4
        )
        axes.annotate(
            label, (x, y), offset, textcoords="offset points", ha="center", va="center"
        )
    axes.set(
        xlim=(0, 9),
        xlabel="optimizer state (bytes per parameter)",
        ylabel="validation loss (nats per token)",
    )
    axes.margins(y=0.15)
    path = pathlib.Path(__file__).with_suffix(".svg")
    figure.savefig(path, transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    with matplotlib.rc_context(STYLE):
        main()

"""The loss curve of a run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from pretraining.files import replacing


def plot_curve(
    path: Path,
    title: str,
    rows: Sequence[Mapping[str, Any]],
    references: Mapping[str, float],
) -> None:
    """Draws training and validation loss against steps, and reference losses.

    Lines differ in style, marker and label: the plot reads without colour too.
    """
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, label, style in (
        ("loss", "training", {"linewidth": 1, "color": "0.6"}),
        ("validation_loss", "validation", {"marker": "o", "color": "C0"}),
    ):
        points = [(row["step"], row[name]) for row in rows if name in row]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **style)
    for (name, loss), dashes in zip(
        references.items(), ("--", ":", "-."), strict=False
    ):
        axes.axhline(loss, linestyle=dashes, color="black", linewidth=1)
        axes.annotate(
            f"{name} {loss:.2f}",
            (1, loss),
            xycoords=("axes fraction", "data"),
            xytext=(-4, 3),
            textcoords="offset points",
            horizontalalignment="right",
        )
    axes.set_xlabel("step")
    axes.set_ylabel("cross-entropy (nats)")
    axes.set_title(title)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:], dpi=150)
    plt.close(figure)

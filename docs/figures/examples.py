"""Draws the pretraining examples' curves into docs/figures: losses against steps.

From what their runs left, metrics.jsonl and summary.json, kept in docs/results/examples
under the names of the scripts:

    python docs/figures/examples.py
"""

import json
import pathlib
import sys

import matplotlib
from drawing import STYLE

HERE = pathlib.Path(__file__).parent
RESULTS = HERE.parent / "results" / "examples"
sys.path.append(str(HERE.parents[1] / "examples"))
from running.metrics import plot_curve  # noqa: E402


def main():
    for log in sorted(RESULTS.glob("pretrain_*.jsonl")):
        rows = [json.loads(line) for line in log.read_text().splitlines()]
        summary = json.loads(log.with_suffix(".json").read_text())
        references, undated = summary["references"], {"Date": None}
        plot_curve(HERE / f"{log.stem}.svg", log.stem, rows, references, undated)


if __name__ == "__main__":
    with matplotlib.rc_context(STYLE):
        main()

"""How the figures look, and all that they take from the examples.

These modules call one another by their names in that folder, as what a script there
imports does, hence the path.
"""

import pathlib
import sys

import matplotlib

matplotlib.use("Agg")
sys.path.append(str(pathlib.Path(__file__).parents[2] / "examples"))

from comparing.figures import COLORS
from comparing.runs import Log
from comparing.summary import spread, summarize
from pretraining.table import format_table

__all__ = ["COLORS", "STYLE", "Log", "format_table", "spread", "summarize"]

# Dark text on white of its own: reads on a light page and on a dark one.
STYLE = {"font.size": 11, "svg.hashsalt": "came-optax"}

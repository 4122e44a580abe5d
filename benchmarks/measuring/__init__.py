"""What the benchmarks share."""

import pathlib

ROOT = pathlib.Path(__file__).parents[2]

"""What the benchmarks share; importing it lets them import the examples' modules."""

import pathlib
import sys

ROOT = pathlib.Path(__file__).parents[2]
sys.path.append(str(ROOT / "examples"))

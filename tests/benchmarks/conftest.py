"""Benchmarks import each other's modules as scripts do: from their own folder."""

import pathlib
import sys

sys.path.append(str(pathlib.Path(__file__).parents[2] / "benchmarks"))

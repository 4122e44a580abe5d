"""The recipes of the documentation run, and hold what they assert."""

import pathlib
import runpy
import sys

import jax
import pytest

RECIPES = pathlib.Path(__file__).parent.parent / "docs" / "recipes"


@pytest.mark.slow(but=5)
@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.py")), ids=lambda p: p.stem)
def test_runs(path, monkeypatch):
    if path.stem == "offload" and jax.__version_info__ < (0, 10):
        pytest.skip("the XLA of jax 0.8.1 refuses scalars beside arrays in host memory")
    monkeypatch.setattr(sys, "argv", [str(path)])
    # As it is for a user.
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        runpy.run_path(str(path), run_name="__main__")

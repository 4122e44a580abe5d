"""What the README says: its code runs and trains, and its links lead somewhere."""

import pathlib
import re

import jax
import pytest

import came_optax

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CODE = re.findall(r"^```python\n(.*?)^```$", README, flags=re.M | re.S)


@pytest.mark.parametrize("code", CODE, ids=["pytree", "nnx"])
def test_code_trains(code):
    names = {}
    with jax.numpy_rank_promotion("allow"):  # as it is for a user
        exec(code, names)
        step, first_loss = names["train_step"], names["loss"]
        x, y = names["x"], names["x"][:, :8]
        for _ in range(20):
            if "model" in names:
                loss = step(names["model"], names["optimizer"], x, y)
            else:
                names["params"], names["state"], loss = step(
                    names["params"], names["state"], x, y
                )
    assert loss < first_loss


@pytest.mark.parametrize("target", re.findall(r"\]\((?!https?:)([^)]+)\)", README))
def test_links_lead_somewhere(target):
    assert (ROOT / target.partition("#")[0]).exists()


def test_versions_agree():
    version = came_optax.__version__
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"version = {{{version}}}" in README
    assert f"\nversion: {version}\n" in citation

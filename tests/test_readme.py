"""What the README says: its code runs and trains, its table of state is right."""

import math
import pathlib
import re

import jax
import optax
import pytest
from measuring.zoo import abstract_params

import came_optax
from came_optax import steady_came

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


@pytest.mark.parametrize(
    ("row", "optimizer"),
    [
        ("`optax.adamw`", optax.adamw(1e-3)),
        ("`optax.adafactor`, momentum 0.9", optax.adafactor(1e-3, momentum=0.9)),
        ("`optax.adafactor`, no momentum", optax.adafactor(1e-3)),
        ("`steady_came`", steady_came(1e-3)),
        ('`steady_came(mu_dtype="bfloat16")`', steady_came(1e-3, mu_dtype="bfloat16")),
        ('`steady_came(mu_dtype="int8")`', steady_came(1e-3, mu_dtype="int8")),
        ('`steady_came(mu_dtype="int4")`', steady_came(1e-3, mu_dtype="int4")),
    ],
)
def test_state_table(row, optimizer):
    params = abstract_params("gpt2")
    state = jax.eval_shape(optimizer.init, params)
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    size = sum(
        math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)
    )
    assert f"({count:,} parameters, float32)" in README
    assert f"| {row} | {size / 1e6:.1f} MB | {size / count:.2f} |" in README


@pytest.mark.parametrize("target", re.findall(r"\]\((?!https?:)([^)]+)\)", README))
def test_links_lead_somewhere(target):
    assert (ROOT / target.partition("#")[0]).exists()


def test_versions_agree():
    version = came_optax.__version__
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"version = {{{version}}}" in README
    assert f"\nversion: {version}\n" in citation

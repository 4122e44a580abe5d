"""What the README says: its code runs and trains, its table of state is right."""

import math
import pathlib
import re

import jax
import jax.numpy as jnp
import optax
import pytest

import came_optax
from came_optax import steady_came

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CODE = re.findall(r"^```python\n(.*?)^```$", README, flags=re.M | re.S)


def gpt2_small_params():
    """The shapes of GPT-2 small, 124 M parameters."""

    def linear(inputs, outputs):
        return {"kernel": array(inputs, outputs), "bias": array(outputs)}

    def layer_norm():
        return {"scale": array(768), "bias": array(768)}

    def array(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    def block():
        return {
            "ln_1": layer_norm(),
            "c_attn": linear(768, 3 * 768),
            "c_proj": linear(768, 768),
            "ln_2": layer_norm(),
            "c_fc": linear(768, 4 * 768),
            "mlp_proj": linear(4 * 768, 768),
        }

    return {
        "wte": array(50257, 768),
        "wpe": array(1024, 768),
        "h": [block() for _ in range(12)],
        "ln_f": layer_norm(),
    }


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
    params = gpt2_small_params()
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

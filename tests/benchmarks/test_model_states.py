"""Well-known models: their sizes as published, the bytes of their states."""

import math
import pathlib
import subprocess
import sys

import jax
import model_states
import pytest
from measuring.zoo import MODELS, abstract_params
from model_states import OPTIMIZERS, state_bytes, table

from came_optax import state_memory

SCRIPT = model_states.__file__
ROOT = pathlib.Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results" / "memory"
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("model", "millions"),
    [
        ("bert-large", 335),
        ("gpt2", 124),
        ("gpt2-xl", 1558),
        ("t5-3b", 2850),
        ("t5-11b", 11307),
    ],
)
def test_models_have_their_published_sizes(model, millions):
    assert size(model) / 1e6 == pytest.approx(millions, rel=0.01)


@pytest.mark.parametrize(
    ("model", "published"),
    [
        ("llama-1b", 1_235_814_400),
        ("llama-8b", 8_030_261_248),
        ("llama-13b", 13_015_864_320),
        ("llama-70b", 70_553_706_496),
        ("gemma-1b", 999_885_952),
        ("gemma-7b", 8_537_680_896),
        ("gemma-12b", 11_766_034_176),
        ("gemma-27b", 27_009_346_304),
        ("qwen-2b", 1_720_574_976),
        ("qwen-8b", 8_190_735_360),
        ("qwen-14b", 14_768_307_200),
        ("qwen-72b", 72_706_203_648),
    ],
)
def test_decoders_have_their_published_sizes_to_the_last_parameter(model, published):
    assert size(model) == published


def size(model):
    return sum(math.prod(p.shape) for p in jax.tree.leaves(abstract_params(model)))


@pytest.mark.parametrize("model", ["bert-large", "gpt2-xl"])
@pytest.mark.parametrize(
    ("optimizer", "budget"),
    [
        ("steady-came", 4.02),
        ("steady-came-bfloat16", 2.03),
        ("steady-came-int8", 1.05),
        ("steady-came-int4", 0.55),
    ],
)
def test_states_keep_to_their_bytes_per_parameter(model, optimizer, budget):
    assert state_bytes(model, optimizer, "float32") <= budget * size(model)


@pytest.mark.parametrize(
    ("row", "optimizer"),
    [
        ("`steady_came`", "steady-came"),
        ('`steady_came(mu_dtype="bfloat16")`', "steady-came-bfloat16"),
        ('`steady_came(mu_dtype="int8")`', "steady-came-int8"),
        ('`steady_came(mu_dtype="int4")`', "steady-came-int4"),
        ("`optax.adamw`", "adamw"),
        ("`optax.adafactor`, momentum 0.9", "adafactor"),
        ("`optax.adafactor`, no momentum", "adafactor-no-momentum"),
    ],
)
def test_the_readme_has_the_states_of_gpt2(row, optimizer):
    count, taken = size("gpt2"), state_bytes("gpt2", optimizer, "float32")
    assert f"({count:,} parameters, float32)" in README
    assert f"| {row} | {taken / 1e6:.1f} MB | {taken / count:.2f} |" in README


def test_the_documented_table_is_what_the_command_prints():
    committed = (RESULTS / "models.md").read_text(encoding="utf-8")
    assert committed == f"{table()}\n"


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_table_counts_whole_states(optimizer):
    for dtype in ("float32", "bfloat16"):
        whole = state_memory(OPTIMIZERS[optimizer](), abstract_params("gpt2", dtype))
        assert state_bytes("gpt2", optimizer, dtype) == whole.total
    if optimizer.startswith("steady-came"):  # One column for both.
        assert whole.total == state_bytes("gpt2", optimizer, "float32")


def test_the_command():
    done = subprocess.run(
        [sys.executable, SCRIPT, "--model=gpt2"],
        capture_output=True,
        text=True,
        check=True,
    )
    expected = state_memory(OPTIMIZERS["steady-came"](), abstract_params("gpt2"))
    assert done.stdout == f"{expected}\n"
    wrong = subprocess.run(
        [sys.executable, SCRIPT, "--model=gpt5"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert wrong.returncode == 2
    assert "invalid choice: 'gpt5'" in wrong.stderr
    assert all(name in wrong.stderr for name in MODELS)

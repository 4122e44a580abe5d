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
MEMORY = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
# What tables call the optimizers.
ROWS = {"`steady_came`": "steady-came", "`optax.adamw`": "adamw"} | {
    f'`steady_came(mu_dtype="{stored}")`': f"steady-came-{stored}"
    for stored in ("bfloat16", "int8", "int4")
}


@pytest.mark.parametrize(
    ("model", "published"),
    [
        ("bert-large", 335e6),
        ("gpt2", 124e6),
        ("gpt2-xl", 1558e6),
        ("t5-3b", 2850e6),
        ("t5-11b", 11307e6),
        # Decoders to the last parameter.
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
def test_models_have_their_published_sizes(model, published):
    within = 0.01 if isinstance(published, float) else 0
    assert size(model) == pytest.approx(published, rel=within, abs=0)


def size(model):
    return sum(math.prod(p.shape) for p in jax.tree.leaves(abstract_params(model)))


@pytest.mark.parametrize("model", ["bert-large", "gpt2-xl"])
def test_states_keep_to_their_bytes_per_parameter(model):
    for stored, budget in (
        ("", 4.02),
        ("-bfloat16", 2.03),
        ("-int8", 1.05),
        ("-int4", 0.55),
    ):
        taken = state_bytes(model, f"steady-came{stored}", "float32")
        assert taken <= budget * size(model), stored


def test_the_readme_has_the_states_of_gpt2():
    count = size("gpt2")
    assert f"({count:,} parameters, float32)" in README
    rows = {
        "`optax.adafactor`, momentum 0.9": "adafactor",
        "`optax.adafactor`, no momentum": "adafactor-no-momentum",
    }
    for row, optimizer in (ROWS | rows).items():
        taken = state_bytes("gpt2", optimizer, "float32")
        assert f"| {row} | {taken / 1e6:.1f} MB | {taken / count:.2f} |" in README


def test_the_memory_page_has_the_states_of_gpt2_xl():
    count = size("gpt2-xl")
    rows = {
        "`optax.adafactor`, momentum": "adafactor",
        "`optax.adafactor`": "adafactor-no-momentum",
    }
    for row, optimizer in (ROWS | rows).items():
        single, half = (
            state_bytes("gpt2-xl", optimizer, dtype) / count
            for dtype in ("float32", "bfloat16")
        )
        cells = f"{single:.3f} | {half:.3f} | {single + 4:.1f} | {half + 2:.1f}"
        assert f"| {row} | {cells} |" in MEMORY


def test_the_memory_page_shows_what_the_command_prints():
    memory = state_memory(OPTIMIZERS["steady-came-int8"](), abstract_params("gpt2-xl"))
    assert f"--optimizer steady-came-int8\n{memory}\n" in MEMORY


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
    def run(model):
        command = [sys.executable, SCRIPT, f"--model={model}"]
        return subprocess.run(command, capture_output=True, text=True)

    expected = state_memory(OPTIMIZERS["steady-came"](), abstract_params("gpt2"))
    done, wrong = run("gpt2"), run("gpt5")
    assert (done.returncode, done.stdout) == (0, f"{expected}\n")
    assert wrong.returncode == 2
    assert "invalid choice: 'gpt5'" in wrong.stderr
    assert all(name in wrong.stderr for name in MODELS)

"""The documentation's code runs: blocks in pages, and the notebook."""

import contextlib
import io
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import matplotlib
import pytest

from came_optax import BalancedSplit, LastTwoAxes, Stacked, state_memory, steady_came

DOCS = pathlib.Path(__file__).parent.parent / "docs"
NOTEBOOK = DOCS / "getting-started.ipynb"


def blocks(path):
    text = path.read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```$", text, flags=re.M | re.S)


def run(code):
    names = {}
    # As it is for a user.
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        for block in code:
            exec(block, names)
    return names


@pytest.mark.slow(but=5)
@pytest.mark.parametrize(
    "path",
    [
        page
        for page in sorted([*DOCS.glob("*.md"), *DOCS.glob("examples/*.md")])
        if blocks(page)
    ],
    ids=lambda path: path.stem,
)
def test_blocks_run(path):
    run(blocks(path))


def test_a_job_that_is_moved_as_the_page_says_goes_on():
    """Parameters move as far as AdamW would have moved them; twice, and back."""
    text = (DOCS / "moving-a-job.md").read_text(encoding="utf-8")
    page = blocks(DOCS / "moving-a-job.md")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        names = run(page[:3])
    assert f"```text\n{printed.getvalue()}```" in text
    adamw, grads, params = (names[name] for name in ("adamw", "grads", "params"))
    state = run(page[:1])["adamw_state"]
    # Back in AdamW, gradients count beside a nu that is young still.
    for number, tolerance in (1, 0.05), (2, 0.05), (3, 0.3):
        updates = run(page[:number])["updates"]
        with jax.numpy_dtype_promotion("standard"):
            expected, state = adamw.update(grads, state, params)
        for name, update in updates.items():
            assert jnp.abs(update).min() > 2e-5  # At step 3 of the schedule's warmup.
            assert jnp.allclose(update, expected[name], rtol=tolerance)


@pytest.mark.slow
def test_notebook_trains():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    # A tenth of the steps; the documentation's build runs it as it stands.
    matplotlib.use("Agg")
    names = run(
        [block.replace("STEPS, BATCH = 1000", "STEPS, BATCH = 110") for block in code]
    )
    assert names["STEPS"] == 110
    for losses in names["results"].values():
        assert losses[-10:].mean() < losses[:10].mean() - 1


def test_memory_page_shows_what_is_printed():
    text = (DOCS / "memory.md").read_text(encoding="utf-8")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        run(blocks(DOCS / "memory.md"))
    shown = re.search(r"^```\n( +shape +rows.*?)^```$", text, flags=re.M | re.S)
    assert shown and printed.getvalue().endswith(shown[1])


def maxtexts_llama_7b():
    """Its shapes, the layers stacked on axis 1."""
    d, layers, heads, inner = 4096, 32, (32, 128), 11008
    per_layer = {
        **{
            f"self_attention/{x}": (d, layers, *heads)
            for x in ("query", "key", "value")
        },
        "self_attention/out": (heads[0], layers, heads[1], d),
        **{f"mlp/wi_{i}": (d, layers, inner) for i in (0, 1)},
        "mlp/wo": (inner, layers, d),
        **{f"{x}_self_attention_layer_norm": (d, layers) for x in ("pre", "post")},
    }
    rest = {"embedding": (32_000, d), "norm": (d,), "logits": (d, 32_000)}
    shapes = rest | {f"layers/{name}": shape for name, shape in per_layer.items()}
    return {
        f"params/{name}": jax.ShapeDtypeStruct(shape, jnp.float32)
        for name, shape in shapes.items()
    }


def test_memory_page_shows_what_is_counted_of_maxtexts_llama():
    text = (DOCS / "memory.md").read_text(encoding="utf-8")
    pattern = r"^```text\n# Llama 7B as in MaxText\n(.*?)^```$"
    shown = re.search(pattern, text, flags=re.M | re.S)
    lines = ""
    for rule in LastTwoAxes(), Stacked(BalancedSplit(), axis=1, where="/layers/"):
        tx = steady_came(1e-3, mu_dtype="int8", factoring=rule)
        memory = state_memory(tx, maxtexts_llama_7b())
        lines += f"{memory.total:,} bytes, {memory.bytes_per_param:.3f} a parameter\n"
    assert shown and shown[1].endswith(lines)

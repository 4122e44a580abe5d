"""The documentation's code runs: blocks in pages, and the notebook."""

import json
import pathlib
import re

import jax
import matplotlib
import pytest

DOCS = pathlib.Path(__file__).parent.parent / "docs"
NOTEBOOK = DOCS / "getting-started.ipynb"


def blocks(path: pathlib.Path) -> list[str]:
    text = path.read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```$", text, flags=re.M | re.S)


def run(code: list[str]) -> dict:
    names: dict = {}
    # As it is for a user.
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        for block in code:
            exec(block, names)
    return names


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
    if path.stem == "in-your-code-base" and jax.__version_info__ < (0, 10):
        pytest.skip("the XLA of jax 0.8.1 refuses scalars beside arrays in host memory")
    run(blocks(path))


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

"""The code of README, pages, notebook and recipes runs, and does what they say."""

import contextlib
import io
import json
import re
import runpy
import sys
import tomllib

import jax
import jax.numpy as jnp
import matplotlib
import optax
import pytest

import came_optax
from came_optax import BalancedSplit, LastTwoAxes, Stacked, state_memory, steady_came
from tests.pages import DOCS, PAGES, read, source

pytestmark = pytest.mark.usefixtures("promotion")


def blocks(name):
    return re.findall(r"^```python\n(.*?)^```$", read(name), flags=re.M | re.S)


def run(code):
    """Returns the names that some blocks leave, and what they print."""
    names, printed = {}, io.StringIO()
    with contextlib.redirect_stdout(printed):
        for block in code:
            exec(block, names)
    return names, printed.getvalue()


@pytest.mark.parametrize("code", blocks("README.md"), ids=["pytree", "nnx"])
def test_the_readmes_code_trains(code):
    names, _ = run([code])
    step, x, y = names["train_step"], names["x"], names["x"][:, :8]
    for _ in range(20):
        if "model" in names:
            loss = step(names["model"], names["optimizer"], x, y)
        else:
            *names["carry"], loss = step(
                *names.get("carry", (names["params"], names["state"])), x, y
            )
    assert loss < names["loss"]


def test_versions_agree():
    version = came_optax.__version__
    assert f"version = {{{version}}}" in read("README.md")
    assert f"\nversion: {version}\n" in read("CITATION.cff")
    extras = tomllib.loads(read("pyproject.toml"))["project"]["optional-dependencies"]
    (pinned,) = (x for x in extras["dev"] if x.startswith("ruff"))
    hooks = read(".pre-commit-config.yaml")  # Run the linter that make check runs.
    assert set(re.findall(r"ruff==[\d.]+", hooks)) == {pinned}


def test_documented_make_targets_are_there():
    targets = set(re.findall(r"^([a-z-]+):", read("Makefile"), flags=re.M))
    for document in ("README.md", "CONTRIBUTING.md", ".ci/run"):
        pattern = r"^\s*(?:step .* )?make ([a-z-]+)"
        named = set(re.findall(pattern, read(document), flags=re.M))
        assert named and named <= targets


def test_every_file_has_tests_that_are_quick(request):
    items = request.session.items
    quick = {item.path for item in items if item.get_closest_marker("slow") is None}
    assert quick == {item.path for item in items}


@pytest.mark.slow(but=5)
@pytest.mark.parametrize("page", [*filter(blocks, PAGES)], ids=lambda path: path.stem)
def test_blocks_run(page):
    run(blocks(page))


@pytest.mark.slow(but=5)
@pytest.mark.parametrize(
    "path", sorted((DOCS / "recipes").glob("*.py")), ids=lambda path: path.stem
)
def test_recipes_run(path, monkeypatch):
    if path.stem == "offload" and jax.__version_info__ < (0, 10):
        pytest.skip("the XLA of jax 0.8.1 refuses scalars beside arrays in host memory")
    monkeypatch.setattr(sys, "argv", [str(path)])
    runpy.run_path(str(path), run_name="__main__")


def test_a_job_that_is_moved_as_the_page_says_goes_on():
    """Parameters move as far as AdamW would have moved them; twice, and back."""
    page = blocks("docs/moving-a-job.md")
    names, printed = run(page[:3])
    assert f"```text\n{printed}```" in read("docs/moving-a-job.md")
    adamw, grads, params = (names[name] for name in ("adamw", "grads", "params"))
    state = run(page[:1])[0]["adamw_state"]
    # Back in AdamW, gradients count beside a nu that is young still.
    for number, tolerance in (1, 0.05), (2, 0.05), (3, 0.3):
        updates = run(page[:number])[0]["updates"]
        expected, state = adamw.update(grads, state, params)
        for name, update in updates.items():
            assert jnp.abs(update).min() > 2e-5  # At step 3 of the schedule's warmup.
            assert jnp.allclose(update, expected[name], rtol=tolerance)


@pytest.mark.slow
def test_notebook_trains():
    cells = json.loads(read("docs/quickstart.ipynb"))["cells"]
    code = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    # A tenth of the steps; the documentation's build runs it as it stands.
    matplotlib.use("Agg")
    tenth = "STEPS, BATCH = 500", "STEPS, BATCH = 110"
    names, _ = run([block.replace(*tenth) for block in code])
    assert names["STEPS"] == 110
    for losses in names["results"].values():
        assert losses[-10:].mean() < losses[:10].mean() - 1


def test_quickstarts_mask_and_rule_are_right_for_attention_biases():
    page = source("quickstart")
    pattern = 'bool(re.search("(^|/)kernel(/value)?$", name))'
    assert pattern in page and pattern in read("docs/recipes/weight_decay_mask.py")
    shapes = {"query": {"kernel": (64, 4, 16), "bias": (4, 16)}}
    params = jax.tree.map(jnp.ones, shapes, is_leaf=lambda x: isinstance(x, tuple))
    (rule,) = re.findall(r"`(ByPath\(.*?\))`", page)
    rows = [
        set(state_memory(steady_came(1e-3, factoring=rule), params).rows)
        for rule in (BalancedSplit(), eval(rule, vars(came_optax)))
    ]
    assert rows == [{"query/kernel", "query/bias"}, {"query/kernel"}]


def test_memory_page_shows_what_is_printed():
    _, printed = run(blocks("docs/memory.md"))
    pattern = r"^```\n( +shape +rows.*?)^```$"
    shown = re.search(pattern, read("docs/memory.md"), flags=re.M | re.S)
    assert shown and printed.endswith(shown[1])


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
    text = read("docs/memory.md")
    pattern = r"^```text\n# Llama 7B as in MaxText\n(.*?)^```$"
    shown = re.search(pattern, text, flags=re.M | re.S)
    lines = ""
    for rule in LastTwoAxes(), Stacked(BalancedSplit(), axis=1, where="/layers/"):
        tx = steady_came(1e-3, mu_dtype="int8", factoring=rule)
        memory = state_memory(tx, maxtexts_llama_7b())
        lines += f"{memory.total:,} bytes, {memory.bytes_per_param:.3f} a parameter\n"
    assert shown and shown[1].endswith(lines)


def test_which_optimizer_says_what_states_take():
    page = read("docs/which-optimizer.md")
    kernel = {"up": {"kernel": jax.ShapeDtypeStruct((1024, 4096), jnp.float32)}}
    halved = {"up": {"kernel": jax.ShapeDtypeStruct((1024, 4096), jnp.bfloat16)}}
    names = vars(came_optax) | {"optax": optax, "lr": 1e-3}

    def taken(text, params):
        assert f"`{text.removesuffix('(lr)')}`" in page
        return state_memory(eval(text, names), params).bytes_per_param

    for text, expected in {
        'steady_came(lr, mu_dtype="int8")': 1,
        "came_muon(2 * lr)": 1,
        "optax.contrib.muon(lr)": 4,
        "optax.lion(lr)": 4,
        "optax.adafactor(lr, multiply_by_parameter_scale=False)": 0,
    }.items():
        assert taken(text, kernel) == pytest.approx(expected, abs=0.02), text
    text = 'with_master_weights(steady_came(lr, mu_dtype="int8"))'
    assert 2 + taken(text, halved) == pytest.approx(4, abs=0.02)


def test_updates_are_as_long_as_the_page_of_questions_says():
    key, shape = jax.random.key(0), (64, 256)
    params = {"up": {"kernel": jax.random.normal(key, shape)}}
    tx = came_optax.came_muon(1.0)
    update, _ = jax.jit(tx.update)(params, tx.init(params), params)
    rms = jnp.sqrt(jnp.mean(update["up"]["kernel"] ** 2))
    said = re.search("[|] ([\\d.]+) at each step ", read("docs/faq.md"))
    assert float(rms) == pytest.approx(float(said[1]), rel=1e-5)

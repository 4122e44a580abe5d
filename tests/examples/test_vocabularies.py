"""WordPiece and Unigram vocabularies: special tokens, round trips, limits."""

import re

import numpy as np
import pytest

from data import masking, span_corruption, tokenization
from task import UserError

DOCUMENTS = [f"This is document {i}, and it says\n{i * i}." for i in range(300)]


def test_a_vocabulary_of_a_large_text_is_learnt_from_a_part_of_it():
    size = sum(map(len, DOCUMENTS))
    assert tokenization.sample(DOCUMENTS, size) is DOCUMENTS
    part = tokenization.sample(DOCUMENTS, size // 3)
    assert sum(map(len, part)) == pytest.approx(size / 3, rel=0.1)
    assert set(part) < set(DOCUMENTS)
    # Of more text it is a part of the same documents.
    assert set(tokenization.sample([*DOCUMENTS, "more"], size // 3)) <= {*part, "more"}
    # Of a few huge ones it is one.
    assert len(tokenization.sample(DOCUMENTS[:3], 1)) == 1


def test_each_vocabulary_is_learnt_from_as_much_as_takes_a_minute(monkeypatch, capsys):
    monkeypatch.setattr(span_corruption, "SAMPLE", 3_000)
    line = r"learning 300 tokens from (\S+) characters of text\n"
    for make, least, most in (
        (tokenization.byte_level_bpe, 9_000, 13_000),
        (span_corruption.unigram, 2_000, 4_000),
    ):
        make(DOCUMENTS, 300)
        said = re.fullmatch(line, capsys.readouterr().out)
        assert least < int(said[1].replace(",", "")) < most
        make(DOCUMENTS, 300)
        assert capsys.readouterr().out == ""  # It is kept.


def test_wordpiece():
    tokenizer = masking.wordpiece(DOCUMENTS, 100)
    ids = [tokenizer.token_to_id(token) for token in masking.SPECIAL]
    assert ids == [0, 1, 2, 3, 4]
    pair = tokenizer.encode("This IS document 12", "and it")
    assert pair.tokens[0] == "[CLS]"
    assert [i for i, t in enumerate(pair.tokens) if t == "[SEP]"] == [
        pair.type_ids.index(1) - 1,
        len(pair.ids) - 1,
    ]
    assert tokenizer.decode(pair.ids) == "this is document 12 and it"
    assert tokenizer.encode("数").tokens == ["[CLS]", "[UNK]", "[SEP]"]


def test_unigram():
    tokenizer = span_corruption.unigram(DOCUMENTS, 160)
    ids = [tokenizer.token_to_id(token) for token in span_corruption.SPECIAL]
    assert ids == [0, 1, 2]
    size = tokenizer.get_vocab_size()
    assert size <= 160
    for k, sentinel in enumerate(span_corruption.SENTINELS):
        assert tokenizer.token_to_id(sentinel) == size - 1 - k
    encoding = tokenizer.encode("This is\n document <extra_id_0> 12")
    assert encoding.tokens[-1] == "</s>"
    assert size - 1 in encoding.ids
    assert tokenizer.decode(encoding.ids) == "This is document  12"
    assert 2 in tokenizer.encode("数").ids


@pytest.mark.parametrize(
    ("make", "start"),
    [
        (tokenization.byte_level_bpe, tokenization.END_OF_TEXT),
        (masking.wordpiece, masking.SEP),
        (span_corruption.unigram, span_corruption.END),
    ],
)
def test_a_stream_has_no_special_tokens_but_the_start(make, start, monkeypatch):
    tokenizer = make(DOCUMENTS, 300)
    stream = tokenization.encode(tokenizer, DOCUMENTS, start)
    expected = []
    for text in DOCUMENTS:
        expected.append(tokenizer.token_to_id(start))
        expected += tokenizer.encode(text, add_special_tokens=False).ids
    assert stream.tolist() == expected
    assert stream.dtype == np.uint16
    monkeypatch.setattr(tokenization, "BATCH", 100)
    assert np.array_equal(stream, tokenization.encode(tokenizer, DOCUMENTS, start))


@pytest.mark.parametrize("make", [masking.wordpiece, span_corruption.unigram])
def test_a_vocabulary_below_the_alphabet_is_refused(make):
    for _ in range(2):  # From the cache too.
        with pytest.raises(UserError, match="--vocab-size 20: "):
            make(DOCUMENTS, 20)


@pytest.mark.parametrize(
    ("make", "start", "special"),
    [
        (tokenization.byte_level_bpe, tokenization.END_OF_TEXT, ["<|endoftext|>"]),
        (masking.wordpiece, masking.SEP, masking.SPECIAL),
        (
            span_corruption.unigram,
            span_corruption.END,
            [*span_corruption.SPECIAL, *span_corruption.SENTINELS[:2]],
        ),
    ],
)
@pytest.mark.parametrize("spelled", [True, False], ids=["in training text", "not"])
def test_special_tokens_spelled_in_a_text_are_text(make, start, special, spelled):
    text = f"Such as {' '.join(special)} and{special[0]} again"
    tokenizer = make([*DOCUMENTS, *[text] * (20 * spelled)], 400)
    control = {tokenizer.token_to_id(token) for token in special}
    if not spelled:
        control -= {tokenizer.token_to_id("[UNK]"), tokenizer.token_to_id("<unk>")}
    first, *tokens = tokenization.encode(tokenizer, [text], start).tolist()
    assert first == tokenizer.token_to_id(start)
    assert not control & set(tokens)
    if spelled:
        decoded = tokenizer.decode(tokens, skip_special_tokens=False)
        assert decoded.replace(" ", "").lower() == text.replace(" ", "").lower()


def test_a_damaged_vocabulary_is_learnt_again(cache):
    before = tokenization.byte_level_bpe(DOCUMENTS, 300).to_str()
    (path,) = cache.iterdir()
    good = path.read_bytes()
    flipped = good.replace(b'"t"', b'"u"', 1)
    assert flipped != good
    for damaged in (b"", b"{}", b"\xff\n{}", good[:-100], flipped):
        path.write_bytes(damaged)
        assert tokenization.byte_level_bpe(DOCUMENTS, 300).to_str() == before
        assert path.read_bytes() == good


def test_a_cache_that_cannot_be_written_is_none(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert tokenization.byte_level_bpe(DOCUMENTS, 300).get_vocab_size() == 300

"""WordPiece and Unigram vocabularies: special tokens, round trips, limits."""

from pathlib import Path

import pytest

from pretraining.data import masking, span_corruption, tokenization
from pretraining.errors import UserError

DOCUMENTS = [f"This is document {i}, and it says\n{i * i}." for i in range(300)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_wordpiece():
    tokenizer = tokenization.wordpiece(DOCUMENTS, 100)
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
    tokenizer = tokenization.unigram(DOCUMENTS, 160)
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


def test_a_stream_has_no_special_tokens_but_the_start():
    for make, start in (
        (tokenization.wordpiece, masking.SEP),
        (tokenization.unigram, span_corruption.END),
    ):
        tokenizer = make(DOCUMENTS, 160)
        stream = tokenization.encode(tokenizer, DOCUMENTS[:2], start).tolist()
        first, second = (
            tokenizer.encode(text, add_special_tokens=False).ids
            for text in DOCUMENTS[:2]
        )
        start_id = tokenizer.token_to_id(start)
        assert stream == [start_id, *first, start_id, *second]


@pytest.mark.parametrize("make", [tokenization.wordpiece, tokenization.unigram])
def test_a_vocabulary_below_the_alphabet_is_refused(make):
    with pytest.raises(UserError, match="--vocab-size 20: "):
        make(DOCUMENTS, 20)
    with pytest.raises(UserError, match="--vocab-size 20"):  # From the cache too.
        make(DOCUMENTS, 20)

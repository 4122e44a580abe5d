"""Subword vocabularies trained on the corpus and cached by its content."""

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import Tokenizer

from pretraining.data import masking, span_corruption
from pretraining.errors import UserError
from pretraining.files import write_atomically

END_OF_TEXT = "<|endoftext|>"


def byte_level_bpe(documents: Sequence[str], vocab_size: int) -> Tokenizer:
    """Returns GPT-2's kind of tokenizer: BPE on bytes, so no text is unknown.

    Raises:
        UserError: The vocabulary has no room for the bytes and END_OF_TEXT.
    """
    if vocab_size < 257:
        raise UserError(f"--vocab-size {vocab_size}: must be at least 257")

    def train() -> Tokenizer:
        tokenizer = Tokenizer(tokenizers.models.BPE())
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
            add_prefix_space=False
        )
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(documents, trainer)
        return tokenizer

    return _cached("bpe", documents, vocab_size, train)


def wordpiece(documents: Sequence[str], vocab_size: int) -> Tokenizer:
    """Returns BERT's kind of tokenizer: lower-case WordPiece, special tokens first."""

    def train() -> Tokenizer:
        tokenizer = Tokenizer(tokenizers.models.WordPiece(unk_token=masking.UNKNOWN))
        tokenizer.normalizer = tokenizers.normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = tokenizers.decoders.WordPiece()
        trainer = tokenizers.trainers.WordPieceTrainer(
            vocab_size=vocab_size,
            special_tokens=list(masking.SPECIAL),
            show_progress=False,
        )
        tokenizer.train_from_iterator(documents, trainer)
        tokenizer.post_processor = tokenizers.processors.BertProcessing(
            *((t, tokenizer.token_to_id(t)) for t in (masking.SEP, masking.CLS))
        )
        return tokenizer

    return _cached("wordpiece", documents, vocab_size, train)


def unigram(documents: Sequence[str], vocab_size: int) -> Tokenizer:
    """Returns T5's kind of tokenizer: Unigram, special tokens first, sentinels last.

    <extra_id_0> has the highest id, <extra_id_1> the one below, and so on.
    """

    def train() -> Tokenizer:
        tokenizer = Tokenizer(tokenizers.models.Unigram())
        tokenizer.normalizer = tokenizers.normalizers.Sequence(
            [
                tokenizers.normalizers.NFKC(),
                tokenizers.normalizers.Replace(tokenizers.Regex(r"\s+"), " "),
            ]
        )
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
        tokenizer.decoder = tokenizers.decoders.Metaspace()
        trainer = tokenizers.trainers.UnigramTrainer(
            vocab_size=max(vocab_size - len(span_corruption.SENTINELS), 1),
            special_tokens=list(span_corruption.SPECIAL),
            unk_token=span_corruption.UNKNOWN,
            show_progress=False,
        )
        try:
            tokenizer.train_from_iterator(documents, trainer)
        except Exception as error:  # `tokenizers` raises nothing more specific.
            raise UserError(f"--vocab-size {vocab_size}: {error}") from error
        tokenizer.add_special_tokens(list(reversed(span_corruption.SENTINELS)))
        end = span_corruption.END
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"$A {end}",
            pair=f"$A {end} $B {end}",
            special_tokens=[(end, tokenizer.token_to_id(end))],
        )
        return tokenizer

    return _cached("unigram", documents, vocab_size, train)


def encode(tokenizer: Tokenizer, documents: Iterable[str], start: str) -> np.ndarray:
    """Encodes documents into one stream, the token `start` before each."""
    start_id = tokenizer.token_to_id(start)
    tokens: list[int] = []
    for encoding in tokenizer.encode_batch_fast(
        list(documents), add_special_tokens=False
    ):
        tokens.append(start_id)
        tokens.extend(encoding.ids)
    return np.asarray(tokens, np.uint16 if max(tokens) < 2**16 else np.uint32)


def _cached(
    kind: str, documents: Sequence[str], vocab_size: int, train: Callable[[], Tokenizer]
) -> Tokenizer:
    content = hashlib.sha256(f"{kind} {vocab_size} {tokenizers.__version__}".encode())
    for document in documents:
        content.update(hashlib.sha256(document.encode()).digest())
    path = _cache_folder() / f"{kind}-{content.hexdigest()[:16]}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, train().to_str())
    tokenizer = Tokenizer.from_file(str(path))
    # WordPiece takes in every character, however few tokens are wanted.
    if tokenizer.get_vocab_size() > vocab_size:
        raise UserError(
            f"--vocab-size {vocab_size}: this text takes {tokenizer.get_vocab_size()} "
            "at least"
        )
    return tokenizer


def _cache_folder() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "came-optax"

"""Subword vocabularies trained on the corpus and cached by its content."""

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import Tokenizer

from pretraining import masking
from pretraining.files import write_atomically

END_OF_TEXT = "<|endoftext|>"


def byte_level_bpe(documents: Sequence[str], vocab_size: int) -> Tokenizer:
    """Returns GPT-2's kind of tokenizer: BPE on bytes, so no text is unknown."""

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
    return Tokenizer.from_file(str(path))


def _cache_folder() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "came-optax"

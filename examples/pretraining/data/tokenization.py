"""Subword vocabularies trained on the corpus and cached by its content."""

import contextlib
import hashlib
import os
import tempfile
import threading
from array import array
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers
from tokenizers import Tokenizer

from pretraining.data import corpus
from pretraining.errors import UserError
from pretraining.files import write_atomically
from pretraining.training.progress import terminal_bar

END_OF_TEXT = "<|endoftext|>"
BATCH = 4_000_000  # Characters encoded at once.
SAMPLE = 100_000_000  # Characters that are enough to learn a vocabulary from.


class Tokens(NamedTuple):
    """Text as tokens, and the tokenizer that was learnt from its training part."""

    tokenizer: Tokenizer
    train: np.ndarray
    validation: np.ndarray


def learn_and_encode(
    text: corpus.TextOptions,
    learn: Callable[[Sequence[str], int], Tokenizer],
    vocab_size: int,
    start: str,
) -> Tokens:
    """Reads a text and encodes it with a vocabulary learnt from it.

    Args:
        text: Which text.
        learn: From documents and a size to a tokenizer, e.g. `byte_level_bpe`.
        vocab_size: The size.
        start: A token put before each document.
    """
    train, validation = corpus.split(corpus.load(text))
    tokenizer = learn(train, vocab_size)
    size = sum(map(len, train)) + sum(map(len, validation))
    print(f"encoding {size:,} characters of text", flush=True)
    return Tokens(
        tokenizer,
        encode(tokenizer, train, start),
        encode(tokenizer, validation, start),
    )


def sample(documents: Sequence[str], size: int) -> Sequence[str]:
    """Returns documents with about so many characters; their own hashes decide."""
    fraction = size / sum(map(len, documents))
    if fraction >= 1:
        return documents
    hashes = [corpus.unit_hash(document) for document in documents]
    # Of a few huge ones, all may lie on the other side.
    threshold = min(1 - fraction, max(hashes))
    return [d for d, h in zip(documents, hashes, strict=True) if h >= threshold]


def byte_level_bpe(documents: Sequence[str], vocab_size: int) -> Tokenizer:
    """Returns GPT-2's kind of tokenizer: BPE on bytes, so no text is unknown.

    Raises:
        UserError: The vocabulary has no room for the bytes and END_OF_TEXT.
    """
    if vocab_size < 257:
        raise UserError(f"--vocab-size {vocab_size}: must be at least 257")

    def train(documents: Sequence[str]) -> Tokenizer:
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

    return cached("bpe", documents, vocab_size, train)


def encode(tokenizer: Tokenizer, documents: Sequence[str], start: str) -> np.ndarray:
    """Encodes documents into one stream, the token `start` before each.

    Special tokens spelled in a document are text.
    """
    tokenizer.encode_special_tokens = True
    start_id = id_of(tokenizer, start)
    tokens = array("H" if tokenizer.get_vocab_size() <= 2**16 else "I")
    # Not all at once: an encoding takes a hundred times what its tokens do.
    size = sum(map(len, documents))
    with terminal_bar(
        total=size, unit=" characters", unit_scale=True, leave=False
    ) as bar:
        for batch in _batches(documents):
            for encoding in tokenizer.encode_batch_fast(
                batch, add_special_tokens=False
            ):
                tokens.append(start_id)
                tokens.extend(encoding.ids)
            bar.update(sum(map(len, batch)))
    return np.frombuffer(tokens, tokens.typecode)


def id_of(tokenizer: Tokenizer, token: str) -> int:
    """Returns a special token's id.

    Raises:
        UserError: The vocabulary lacks it.
    """
    found = tokenizer.token_to_id(token)
    if found is None:
        raise UserError(f"the tokenizer has no {token}")
    return found


def cached(
    kind: str,
    documents: Sequence[str],
    vocab_size: int,
    train: Callable[[Sequence[str]], Tokenizer],
    *,
    enough: int = SAMPLE,
) -> Tokenizer:
    """Returns the tokenizer that `train` makes of documents, kept for the next time.

    Args:
        kind: Names the file that keeps it.
        documents: The text.
        vocab_size: The size wanted.
        train: Makes it of these documents, or of some of them.
        enough: Characters of text to learn from.

    Raises:
        UserError: It has more tokens than `vocab_size`.
    """
    documents = sample(documents, enough)
    content = hashlib.sha256(f"{kind} {vocab_size} {tokenizers.__version__}".encode())
    for document in documents:
        content.update(hashlib.sha256(document.encode()).digest())
    path = _cache_folder() / f"{kind}-{content.hexdigest()[:16]}.json"
    text = _read_cached(path)
    if text is None:
        size = sum(map(len, documents))
        learning = f"learning {vocab_size:,} tokens from {size:,} characters of text"
        print(learning, flush=True)
        text = _interruptibly(lambda: train(documents)).to_str()
        with contextlib.suppress(OSError):  # It can do without.
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, f"{_digest(text)}\n{text}")
    tokenizer = Tokenizer.from_str(text)
    # WordPiece takes in every character, however few tokens are wanted.
    if tokenizer.get_vocab_size() > vocab_size:
        raise UserError(
            f"--vocab-size {vocab_size}: this text takes {tokenizer.get_vocab_size()} "
            "at least"
        )
    return tokenizer


def _batches(documents: Sequence[str]) -> Iterator[list[str]]:
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document)
        if size > BATCH:
            yield batch
            batch, size = [], 0
    yield batch


def _interruptibly(work: Callable[[], Tokenizer]) -> Tokenizer:
    """Works in another thread: in this one Ctrl-C would wait until it is done."""
    future: Future[Tokenizer] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future.result()


def _read_cached(path: Path) -> str | None:
    """Returns the tokenizer in a file, None if that is missing or damaged."""
    try:
        digest, _, text = path.read_text(encoding="utf-8").partition("\n")
    except (OSError, ValueError):
        return None
    return text if digest == _digest(text) else None


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _cache_folder() -> Path:
    if cache := os.environ.get("XDG_CACHE_HOME"):
        return Path(cache) / "came-optax"
    try:
        return Path.home() / ".cache" / "came-optax"
    except RuntimeError:  # This user has no home.
        return Path(tempfile.gettempdir()) / "came-optax"

"""From text to tokens: vocabularies learnt from it, and how well counting does."""

import contextlib
import hashlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import platformdirs
import tokenizers
from tokenizers import Tokenizer
from tqdm import tqdm

from data import corpus
from task import UserError

END_OF_TEXT = "<|endoftext|>"
BATCH = 4_000_000  # Characters encoded at once.
COUNTED = 10_000_000  # Tokens counted at once.
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
        tokenizer, encode(tokenizer, train, start), encode(tokenizer, validation, start)
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
    with tqdm(
        total=size, unit=" characters", unit_scale=True, leave=False, disable=None
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
    cache = platformdirs.user_cache_path("came-optax")
    path = cache / f"{kind}-{content.hexdigest()[:16]}.json"
    text = _read_cached(path)
    if text is None:
        size = sum(map(len, documents))
        learning = f"learning {vocab_size:,} tokens from {size:,} characters of text"
        print(learning, flush=True)
        text = train(documents).to_str()
        with contextlib.suppress(OSError):  # It can do without.
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{_digest(text)}\n{text}", encoding="utf-8")
    tokenizer = Tokenizer.from_str(text)
    # WordPiece takes in every character, however few tokens are wanted.
    if tokenizer.get_vocab_size() > vocab_size:
        raise UserError(
            f"--vocab-size {vocab_size}: this text takes {tokenizer.get_vocab_size()} "
            "at least"
        )
    return tokenizer


def load(folder: Path | str, vocab_size: int, special: Sequence[str] = ()) -> Tokenizer:
    """Returns the tokenizer in tokenizer.json.

    Args:
        folder: The folder that it is in.
        vocab_size: The model's.
        special: Tokens that it must have.

    Raises:
        UserError: There is none, or it does not fit the model.
    """
    path = Path(folder) / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # `tokenizers` raises nothing more specific.
        raise UserError(f"{path}: not a tokenizer: {error}") from error
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest >= vocab_size:
        raise UserError(
            f"{path}: has {highest + 1} tokens, more than the model's {vocab_size}"
        )
    for token in special:
        if tokenizer.token_to_id(token) is None:
            raise UserError(f"{path}: has no {token}")
    return tokenizer


def cross_entropies(
    train: np.ndarray, validation: np.ndarray, vocab_size: int
) -> dict[str, float]:
    """Cross-entropies of the validation text in nats per token.

    Unigram probabilities are counts plus one. The bigram model interpolates with them
    by Witten and Bell's rule: p(w | v) = (c(v, w) + T(v) p(w)) / (c(v) + T(v)), where
    T(v) counts the different tokens seen after v.
    """
    count_V, pairs, pair_counts = _count(train, vocab_size)
    unigram_V = (count_V + 1.0) / (count_V + 1.0).sum()
    seen_V = count_V.copy()
    seen_V[train[-1]] -= 1  # Nothing follows the last.
    kinds_V = np.bincount(pairs // vocab_size, minlength=vocab_size)
    validation = validation.astype(np.int64)

    before, after = validation[:-1], validation[1:]
    wanted = before * vocab_size + after
    index = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
    count = np.where(pairs[index] == wanted, pair_counts[index], 0)
    # A token never followed by any leaves 0/0: the unigram model then stands alone.
    kinds = np.maximum(kinds_V[before], 1)
    bigram = (count + kinds * unigram_V[after]) / (seen_V[before] + kinds)
    return {
        "unigram": float(-np.log(unigram_V[after]).mean()),
        "bigram": float(-np.log(bigram).mean()),
    }


def _batches(documents: Sequence[str]) -> Iterator[list[str]]:
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document)
        if size > BATCH:
            yield batch
            batch, size = [], 0
    yield batch


def _read_cached(path: Path) -> str | None:
    """Returns the tokenizer in a file, None if that is missing or damaged."""
    try:
        digest, _, text = path.read_text(encoding="utf-8").partition("\n")
    except (OSError, ValueError):
        return None
    return text if digest == _digest(text) else None


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _count(
    tokens: np.ndarray, vocab_size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Counts tokens, and pairs of neighbours as first * vocab_size + second.

    Part by part, as this takes many times the memory of the tokens.
    """
    count_V = np.zeros(vocab_size, np.int64)
    pairs, counts = np.zeros(0, np.int64), np.zeros(0, np.int64)
    for start in range(0, len(tokens), COUNTED):
        part = tokens[start : start + COUNTED + 1].astype(np.int64)
        count_V += np.bincount(part[:COUNTED], minlength=vocab_size)
        new, new_counts = np.unique(
            part[:-1] * vocab_size + part[1:], return_counts=True
        )
        pairs, place = np.unique(np.concatenate([pairs, new]), return_inverse=True)
        summed = np.zeros(len(pairs), np.int64)
        np.add.at(summed, place, np.concatenate([counts, new_counts]))
        counts = summed
    return count_V, pairs, counts

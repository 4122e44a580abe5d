"""What optimizers are compared on: a model of any size, and a text in three parts.

A document's own hash decides whether it is learnt from, tuned on or judged on.
"""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
from tokenizers import Tokenizer

from comparing.log import replacing
from data import corpus, masking, pipeline, span_corruption, tokenization
from data.pipeline import Windows
from models import bert, gpt2, t5
from task import Records, Task, UserError
from tasks.bert import masked_token_loss
from tasks.gpt2 import next_token_loss
from tasks.t5 import target_token_loss

# Of the documents, held out for each.
HELD_OUT = 0.01


@dataclasses.dataclass(frozen=True)
class Splits:
    """A task, and the records that its runs are evaluated on.

    Attributes:
        task: Its `validation` is what judges.
        tuning: Held out too, for choosing settings.
    """

    task: Task
    tuning: Records


def make(
    name: str, model: Mapping[str, Any], corpora: Sequence[str], cache: Path
) -> Splits:
    """Returns a task.

    Args:
        name: Its name; the part before the first "-" is the kind: gpt2, bert or t5.
        model: The model's sizes, and for T5 how many "inputs" a sequence has.
        corpora: Which texts, as one: names that `corpus.TextOptions` has, or files.
        cache: The folder that keeps them as tokens.
    """
    documents = [text for name in corpora for text in corpus.load(_options(name))]
    places = [corpus.unit_hash(document) for document in documents]
    if len(set(places)) < 3:
        raise UserError(
            f"{', '.join(corpora)}: three different documents are needed, to train, "
            "tune and judge on"
        )
    first, second = sorted(set(places))[:2]  # Held out however few there are.
    limits = (max(HELD_OUT, first), max(2 * HELD_OUT, second))
    parts: list[list[str]] = [[], [], []]
    for document, place in zip(documents, places, strict=True):
        parts[sum(place > limit for limit in limits)].append(document)
    if (kind := _KINDS.get(name.partition("-")[0])) is None:
        raise UserError(f"task {name}: must begin with one of {', '.join(_KINDS)}")
    try:
        task, tokenizer, start, length, overlap = kind(dict(model), parts[-1])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"model of task {name}: {error}") from error
    tuning, judging, train = (
        Windows(_encoded(tokenizer, part, start, cache), length, overlap)
        for part in parts
    )
    whole = Task(name=name, train=train, validation=judging, **task)
    for held_out in judging, tuning:
        pipeline.check_lengths(dataclasses.replace(whole, validation=held_out))
    return Splits(whole, tuning)


def _options(name: str) -> corpus.TextOptions:
    for packaged in get_args(corpus.Corpus):
        if name == packaged:
            return corpus.TextOptions(corpus=packaged)
    return corpus.TextOptions(text=[name])


# What a task is made of; how its text is encoded, what starts a document, and how long
# its records are and what they overlap.
_Kind = tuple[dict[str, Any], Tokenizer, str, int, int]


def _gpt2(model: dict[str, Any], documents: Sequence[str]) -> _Kind:
    config = gpt2.GPT2Config(**model)
    length = config.n_positions
    task = {
        "make_model": lambda rngs: gpt2.GPT2(config, rngs=rngs),
        "loss_fn": next_token_loss,
        "tokens_per_record": length,
    }
    tokenizer = tokenization.byte_level_bpe(documents, config.vocab_size)
    return task, tokenizer, tokenization.END_OF_TEXT, length, 1


def _bert(model: dict[str, Any], documents: Sequence[str]) -> _Kind:
    config = bert.BERTConfig(**model)
    length = config.max_position_embeddings
    tokenizer = masking.wordpiece(documents, config.vocab_size)
    task = {
        "make_model": lambda rngs: bert.MaskedLM(config, rngs=rngs),
        "loss_fn": masked_token_loss,
        "tokens_per_record": length,
        "transform": masking.Masking(tokenizer.get_vocab_size()),
    }
    return task, tokenizer, masking.SEP, length - 2, 0  # For [CLS] and [SEP].


def _t5(model: dict[str, Any], documents: Sequence[str]) -> _Kind:
    inputs = model.pop("inputs")
    config = t5.T5Config(**model)
    tokenizer = span_corruption.unigram(documents, config.vocab_size)
    corruption = span_corruption.SpanCorruption.fitting(
        inputs, tokenizer.get_vocab_size()
    )
    task = {
        "make_model": lambda rngs: t5.T5(config, rngs=rngs),
        "loss_fn": target_token_loss,
        "tokens_per_record": corruption.length,
        "transform": corruption,
    }
    return task, tokenizer, span_corruption.END, corruption.length, 0


_KINDS = {"gpt2": _gpt2, "bert": _bert, "t5": _t5}


def _encoded(
    tokenizer: Tokenizer, documents: Sequence[str], start: str, cache: Path
) -> np.ndarray:
    """Encodes documents, once for all processes and their restarts."""
    digest = hashlib.sha256(tokenizer.to_str().encode())
    for document in documents:
        digest.update(hashlib.sha256(document.encode()).digest())
    path = cache / f"tokens-{digest.hexdigest()[:16]}.npy"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.save(file, tokenization.encode(tokenizer, documents, start))
    return np.load(path)

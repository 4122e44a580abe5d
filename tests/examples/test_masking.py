"""BERT's masking: how much, what by, what never."""

import numpy as np
import pytest

from data.masking import Masking

MASKING = Masking(vocab_size=50)


def masked(tokens, seed):
    return MASKING({"tokens": tokens}, np.random.default_rng(seed))


@pytest.mark.parametrize("length", [1, 20, 126])
def test_frame_and_targets(length):
    tokens = np.random.default_rng(0).integers(5, 50, length)
    record = masked(tokens, 1)
    framed = np.concatenate([[2], tokens, [3]])
    positions = record["positions"]
    assert len(record["tokens"]) == length + 2
    assert len(positions) == max(1, round(0.15 * (length + 2)))
    assert (np.diff(positions) > 0).all()
    assert (record["targets"] == framed[positions]).all()
    others = np.setdiff1d(np.arange(length + 2), positions)
    assert (record["tokens"][others] == framed[others]).all()
    assert {array.dtype for array in record.values()} == {np.dtype(np.int32)}


def test_eighty_ten_ten():
    tokens = np.arange(5, 50).repeat(3)
    records = [masked(tokens, seed) for seed in range(500)]
    targets = np.concatenate([record["targets"] for record in records])
    inputs = np.concatenate([r["tokens"][r["positions"]] for r in records])
    assert (inputs == 4).mean() == pytest.approx(0.8, abs=0.015)
    # One in 45 of the other tokens is by chance the same.
    assert (inputs == targets).mean() == pytest.approx(0.1 + 0.1 / 45, abs=0.01)
    other = inputs[(inputs != 4) & (inputs != targets)]
    assert set(other) == set(range(5, 50))
    positions = np.concatenate([record["positions"] for record in records])
    assert set(positions) == set(range(1, 136))


def test_special_tokens_are_masked_only_for_want_of_others():
    tokens = np.full(30, 3)
    tokens[::3] = 40
    for seed in range(50):
        assert (masked(tokens, seed)["targets"] == 40).all()
    assert len(masked(np.full(30, 3), 0)["positions"]) == 5


def test_each_reading_masks_anew_and_a_generator_decides():
    tokens = np.arange(5, 50)
    first, again, other = (masked(tokens, seed)["tokens"] for seed in (0, 0, 1))
    assert (first == again).all()
    assert (first != other).any()

"""Span corruption: complete, of fixed lengths, of the published rates."""

import numpy as np
import pytest

from data.span_corruption import SpanCorruption
from task import UserError

END = 1
SENTINEL_IDS = range(1099, 999, -1)


def corrupted(corruption, seed):
    tokens = np.arange(10, 10 + corruption.length)
    record = {"tokens": tokens, "weight": np.float32(1)}
    result = corruption(record, np.random.default_rng(seed))
    assert result.keys() == {"inputs", "targets", "weight"}
    assert result["inputs"].dtype == result["targets"].dtype == np.int32
    return result["inputs"].tolist(), result["targets"].tolist()


def spans(tokens):
    """Returns what follows each sentinel; -1 stands for what comes before any."""
    found, at = {-1: []}, -1
    for token in tokens:
        if token in SENTINEL_IDS:
            assert token not in found
            at = token
            found[at] = []
        else:
            found[at].append(token)
    return found


@pytest.mark.parametrize("inputs", [6, 17, 128, 512])
def test_inputs_and_targets_make_up_the_window(inputs):
    corruption = SpanCorruption.fitting(inputs, 1100)
    for seed in range(20):
        source, target = corrupted(corruption, seed)
        assert len(source) == corruption.inputs <= inputs
        assert len(target) == corruption.noise + corruption.spans + 1
        assert source.pop() == target.pop() == END
        kept, cut = spans(source), spans(target)
        used = list(SENTINEL_IDS[: corruption.spans])
        assert list(kept) == [-1, *used]
        assert list(cut) == [-1, *used]
        assert not cut[-1]
        window = kept[-1]
        for sentinel in used:
            assert cut[sentinel]
            window = window + cut[sentinel] + kept[sentinel]
        assert window == list(range(10, 10 + corruption.length))


def test_lengths_are_the_published_ones():
    # 568 tokens become 512 inputs and 114 targets.
    corruption = SpanCorruption.fitting(512, 1100)
    assert (corruption.length, corruption.inputs) == (568, 512)
    assert corruption.noise + corruption.spans + 1 == 114


def test_every_position_is_cut_at_the_rate():
    corruption = SpanCorruption.fitting(64, 1100)
    cut = np.zeros(corruption.length)
    for seed in range(1000):
        _, target = corrupted(corruption, seed)
        places = [t - 10 for t in target if t != END and t not in SENTINEL_IDS]
        cut[places] += 1 / 1000
    assert cut.mean() == pytest.approx(0.15, abs=0.01)
    # A window begins with a kept span and ends with a cut one, as in T5's own code.
    assert cut[0] == 0
    assert cut[-1] == pytest.approx(1)
    assert cut[1:-1].min() > 0.02


@pytest.mark.parametrize("inputs", [1, 5, 4000])
def test_impossible_lengths_are_refused(inputs):
    with pytest.raises(UserError, match=f"--seq-len {inputs}: must be from 6"):
        SpanCorruption.fitting(inputs, 1100)

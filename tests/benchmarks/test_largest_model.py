"""The search for the largest model, against memory that is a known function."""

import pytest
from largest_model import largest, layers_of, num_params


def needed(layers):
    return 7 * num_params(layers) + 3e8


@pytest.mark.parametrize("guess", [1, 40, 500])
@pytest.mark.parametrize("truth", [2, 37, 64, 111])
def test_finds_the_last_that_fits(truth, guess):
    tried = []
    available = needed(truth) + 1

    def measure(layers):
        tried.append(layers)
        return {"bytes": needed(layers), "fits": needed(layers) <= available}

    assert largest(measure, guess, available) == truth
    assert {truth, truth + 1} <= set(tried)
    assert len(tried) == len(set(tried)) <= 7


def test_layers_of_inverts_num_params():
    assert [layers_of(num_params(n)) for n in (2, 48, 100)] == [2, 48, 100]
    assert layers_of(num_params(48) - 1) == 47

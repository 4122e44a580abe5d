"""Factoring rules that are made wrongly, that answer wrongly, or do not fit a leaf."""

import jax.numpy as jnp
import pytest

from came_optax import (
    ByPath,
    FactoredAxes,
    LargestTwoAxes,
    LastTwoAxes,
    Stacked,
    came,
    scale_by_confidence,
    scale_by_factored_moment,
)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Stacked(LastTwoAxes), TypeError, r"Stacked\(rule=.*got <class"),
        (lambda: Stacked(axis="0"), TypeError, r"Stacked\(axis=.*int, got '0'"),
        (lambda: Stacked(where="["), ValueError, r"Stacked\(where=.*'\[': untermin"),
        (lambda: Stacked(where=None), ValueError, r"Stacked\(where=.*got None"),
        (lambda: LargestTwoAxes(0), ValueError, r"min_dim_size=.*int >= 1, got 0"),
        (lambda: LargestTwoAxes("8"), ValueError, r"min_dim_size=.*int >= 1, got '8'"),
        (lambda: ByPath(LastTwoAxes()), TypeError, "must be a dict .*got LastTwoAxes"),
        (lambda: ByPath({"[": LastTwoAxes()}), ValueError, r"each key .*got '\['"),
        (lambda: ByPath({1: LastTwoAxes()}), ValueError, "each key .*got 1"),
        (lambda: ByPath({"a": (0, 1)}), TypeError, r"at 'a' must be .*got \(0, 1\)"),
        (
            lambda: ByPath({"a": FactoredAxes([0], [1])}),
            TypeError,
            r"at 'a': row, col and stack must be tuples of ints",
        ),
        (lambda: ByPath({}, default=None), TypeError, r"default=...\) .*got None"),
    ],
)
def test_rules(make, error, message):
    with pytest.raises(error, match=message):
        make()


class Answer:
    """A rule that gives every leaf the same answer."""

    def __init__(self, answer):
        self.axes = lambda path, shape: answer


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        ((0, 1), TypeError, r"\(0, 1\).*FactoredAxes and None"),
        (FactoredAxes(0, 1), TypeError, "must be tuples of axes"),
        (FactoredAxes((0,), (2,)), ValueError, "axes from -2 to 1"),
        (FactoredAxes((0,), (1.0,)), ValueError, "from -2 to 1"),
        (FactoredAxes((0,), (-2,)), ValueError, "named only once"),
        (FactoredAxes((0,), ()), ValueError, "both row and col"),
        (FactoredAxes((), (1,)), ValueError, "both row and col"),
    ],
)
def test_answers_of_rules(answer, error, message):
    for make in (scale_by_factored_moment, scale_by_confidence):
        with pytest.raises(error, match=f"(?=.*'a').*{message}"):
            make(factoring=Answer(answer)).init({"a": jnp.ones((3, 2))})


@pytest.mark.parametrize(
    ("rule", "shape", "message"),
    [
        (Answer(FactoredAxes((0,), (1,))), (), "allowed are no axes"),
        (Stacked(axis=2), (3, 2), r"Stacked\(axis=2\).*no such axis.*where="),
        (Stacked(Answer(FactoredAxes((0,), (1,)))), (3, 2), "from -1 to 0"),
    ],
)
def test_rules_that_do_not_fit_a_leaf(rule, shape, message):
    with pytest.raises(ValueError, match=f"(?=.*'a').*{message}"):
        came(1e-3, factoring=rule).init({"a": jnp.ones(shape)})

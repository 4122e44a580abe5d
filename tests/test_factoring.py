"""The factoring rules: which axes, and hence which statistics, a leaf gets."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from came_optax import (
    BalancedSplit,
    FactoredAxes,
    FactoringRule,
    LargestTwoAxes,
    LastTwoAxes,
    Stacked,
    came,
    scale_by_confidence,
    scale_by_factored_moment,
)


@pytest.mark.parametrize(
    "rule, shape, expected",
    [
        (LastTwoAxes(), (), None),
        (LastTwoAxes(), (5,), None),
        (LastTwoAxes(), (1, 1), FactoredAxes((0,), (1,))),
        (LastTwoAxes(), (3, 3, 64, 128), FactoredAxes((2,), (3,))),
        (LargestTwoAxes(), (128,), None),
        (LargestTwoAxes(), (127, 4096), None),
        (LargestTwoAxes(), (4096, 128), FactoredAxes((1,), (0,))),
        (LargestTwoAxes(2), (4, 1, 3), FactoredAxes((2,), (0,))),
        (BalancedSplit(), (), None),
        (BalancedSplit(), (5,), None),
        (BalancedSplit(), (3, 2), FactoredAxes((0,), (1,))),
        (BalancedSplit(), (768, 12, 64), FactoredAxes((0,), (1, 2))),
        (BalancedSplit(), (12, 64, 768), FactoredAxes((0, 1), (2,))),
        (BalancedSplit(), (3, 3, 64, 128), FactoredAxes((0, 1, 2), (3,))),
        (Stacked(), (24,), FactoredAxes(stack=(0,))),
        (Stacked(), (24, 5), FactoredAxes(stack=(0,))),
        (Stacked(), (24, 5, 6), FactoredAxes((1,), (2,), stack=(0,))),
        (Stacked(axis=1), (5, 24, 6), FactoredAxes((0,), (2,), stack=(1,))),
        (Stacked(axis=-1), (5, 6, 24), FactoredAxes((0,), (1,), stack=(2,))),
        (
            Stacked(BalancedSplit(), axis=1),
            (64, 24, 4, 16),
            FactoredAxes((0,), (2, 3), stack=(1,)),
        ),
        (
            Stacked(Stacked(LastTwoAxes(), axis=1)),
            (2, 5, 3, 6),
            FactoredAxes((1,), (3,), stack=(0, 2)),
        ),
    ],
)
def test_axes(
    rule: FactoringRule, shape: tuple[int, ...], expected: FactoredAxes | None
) -> None:
    assert rule.axes((), shape) == expected


@pytest.mark.parametrize(
    "shape", [(6,), (4, 4), (9, 4), (4, 9), (3, 9), (5, 2, 7), (7, 5, 5), (4, 4, 4, 9)]
)
def test_largest_two_axes_are_those_of_optax_adafactor(shape: tuple[int, ...]) -> None:
    ours = scale_by_factored_moment(factoring=LargestTwoAxes(4)).init(jnp.ones(shape))
    optaxs = optax.scale_by_factored_rms(min_dim_size_to_factor=4).init(jnp.ones(shape))
    for name in ("v_row", "v_col", "v"):
        assert getattr(ours, name).shape == getattr(optaxs, name).shape, name


def test_statistics_are_means_over_the_other_side() -> None:
    g = jax.random.normal(jax.random.key(0), (2, 3, 4, 5))
    first, second = scale_by_factored_moment(0.5), scale_by_confidence(0.5, 0.5)
    _, state = first.update(g, first.init(g))
    np.testing.assert_allclose(state.v_row, (g**2).mean(3) / 2, rtol=1e-6)
    np.testing.assert_allclose(state.v_col, (g**2).mean(2) / 2, rtol=1e-6)
    _, state = second.update(g, second.init(g))
    np.testing.assert_allclose(state.s_row, (g**2).mean(3) / 8, rtol=1e-6)
    np.testing.assert_allclose(state.s_col, (g**2).mean(2) / 8, rtol=1e-6)


def test_where_is_searched_in_the_path() -> None:
    rule = Stacked(LastTwoAxes(), where=r"blocks/.*kernel$")
    params = {
        "blocks": {"kernel": jnp.ones((2, 3, 4)), "bias": jnp.ones((2, 3))},
        "kernel": jnp.ones((2, 3)),
    }
    state = scale_by_factored_moment(factoring=rule).init(params)
    shapes = jax.tree.map(jnp.shape, state.v_row)
    assert shapes == {"blocks": {"kernel": (2, 3), "bias": (2,)}, "kernel": (2,)}


@dataclasses.dataclass(frozen=True)
class SquareMatrices:
    """A user's own rule, which sees the path and may count axes from the end."""

    unless: str

    def axes(self, path: Any, shape: tuple[int, ...]) -> FactoredAxes | None:
        if self.unless in jax.tree_util.keystr(path) or len(set(shape)) != 1:
            return None
        return FactoredAxes(row=(-2,), col=(np.int64(-1),))


def test_any_object_with_an_axes_method_is_a_rule() -> None:
    params = {"a": jnp.ones((3, 3)), "b": jnp.ones((3, 2)), "odd": jnp.ones((3, 3))}
    tx = came(1e-3, factoring=SquareMatrices(unless="odd"))
    state = optax.tree.get(tx.init(params), "v_row")
    assert jax.tree.map(jnp.shape, state) == {"a": (3,), "b": (1,), "odd": (1,)}
    negative, _ = tx.update(params, tx.init(params))
    named, _ = came(1e-3).update(
        {"a": params["a"]}, came(1e-3).init({"a": params["a"]})
    )
    np.testing.assert_array_equal(negative["a"], named["a"])

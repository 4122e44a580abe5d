"""The factoring rules: which axes, and hence which statistics, a leaf gets."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers

from came_optax import (
    BalancedSplit,
    ByMuonDimensionNumbers,
    ByPath,
    FactoredAxes,
    LargestTwoAxes,
    LastTwoAxes,
    Stacked,
    came,
    scale_by_confidence,
    scale_by_factored_moment,
)
from came_optax._factored_axes import factored_axes


@pytest.mark.parametrize(
    "rule, shape, expected",
    [
        (LastTwoAxes(), (), None),
        (LastTwoAxes(), (5,), None),
        (LastTwoAxes(), (1, 1), FactoredAxes((0,), (1,))),
        (LastTwoAxes(), (3, 3, 64, 128), FactoredAxes((2,), (3,))),
        (LastTwoAxes(2), (1, 1), None),
        (LastTwoAxes(2), (768, 1), None),
        (LastTwoAxes(2), (9, 768, 2), FactoredAxes((1,), (2,))),
        (LastTwoAxes(3), (2, 2, 768), None),
        (LargestTwoAxes(), (128,), None),
        (LargestTwoAxes(), (127, 4096), None),
        (LargestTwoAxes(), (4096, 128), FactoredAxes((1,), (0,))),
        (LargestTwoAxes(2), (4, 1, 3), FactoredAxes((2,), (0,))),
        (BalancedSplit(), (), None),
        (BalancedSplit(), (5,), None),
        (BalancedSplit(), (3, 2), FactoredAxes((0,), (1,))),
        (BalancedSplit(), (7, 1), FactoredAxes((0,), (1,))),
        (BalancedSplit(2), (7, 1), None),
        (BalancedSplit(4), (2, 2, 4), FactoredAxes((0, 1), (2,))),
        (BalancedSplit(5), (2, 2, 4), None),
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
def test_axes(rule, shape, expected):
    assert rule.axes((), shape) == expected


@pytest.mark.parametrize(
    "shape", [(6,), (4, 4), (9, 4), (4, 9), (3, 9), (5, 2, 7), (7, 5, 5), (4, 4, 4, 9)]
)
def test_largest_two_axes_are_those_of_optax_adafactor(shape):
    ours = scale_by_factored_moment(factoring=LargestTwoAxes(4)).init(jnp.ones(shape))
    optaxs = optax.scale_by_factored_rms(min_dim_size_to_factor=4).init(jnp.ones(shape))
    for name in ("v_row", "v_col", "v"):
        assert getattr(ours, name).shape == getattr(optaxs, name).shape, name


def test_statistics_are_means_over_the_other_side():
    g = jax.random.normal(jax.random.key(0), (2, 3, 4, 5))
    first, second = scale_by_factored_moment(0.5), scale_by_confidence(0.5, 0.5)
    _, state = first.update(g, first.init(g))
    np.testing.assert_allclose(state.v_row, (g**2).mean(3) / 2, rtol=1e-6)
    np.testing.assert_allclose(state.v_col, (g**2).mean(2) / 2, rtol=1e-6)
    _, state = second.update(g, second.init(g))
    np.testing.assert_allclose(state.s_row, (g**2).mean(3) / 8, rtol=1e-6)
    np.testing.assert_allclose(state.s_col, (g**2).mean(2) / 8, rtol=1e-6)


@pytest.mark.parametrize(
    "axes", [FactoredAxes((0,), (1,)), FactoredAxes((1,), (0,), (2,))]
)
@pytest.mark.parametrize("shape", [(7, 1, 1), (1, 1, 2), (3, 5, 1)])
def test_axes_given_by_hand_are_obeyed(axes, shape):
    assert factored_axes(ByPath({"": axes}), {"x": jnp.ones(shape)}) == {"x": axes}


def test_where_is_searched_in_the_path():
    rule = Stacked(LastTwoAxes(), where=r"blocks/.*kernel$")
    params = {
        "blocks": {"kernel": jnp.ones((2, 6, 5)), "bias": jnp.ones((2, 6))},
        "kernel": jnp.ones((6, 5)),
    }
    assert factored_axes(rule, params) == {
        "blocks": {
            "kernel": FactoredAxes((1,), (2,), stack=(0,)),
            "bias": FactoredAxes((0,), (1,)),
        },
        "kernel": FactoredAxes((0,), (1,)),
    }


def test_the_first_expression_that_matches_says():
    by_path = {
        "q_einsum": FactoredAxes(row=(1,), col=(0, 2)),
        "^embedder/": FactoredAxes(),
        "einsum$": Stacked(LastTwoAxes()),
    }
    found = factored_axes(
        ByPath(by_path, default=BalancedSplit()),
        {
            "embedder": {"einsum": jnp.ones((64, 8))},
            "layer": {
                "q_einsum": jnp.ones((4, 8, 6)),
                "kv_einsum": jnp.ones((2, 8, 6)),
            },
            "gating": jnp.ones((2, 8, 32)),
        },
    )
    assert found == {
        "embedder": {"einsum": FactoredAxes()},
        "layer": {
            "q_einsum": FactoredAxes((1,), (0, 2)),
            "kv_einsum": FactoredAxes((1,), (2,), stack=(0,)),
        },
        "gating": FactoredAxes((0, 1), (2,)),
    }


@pytest.mark.slow(but=1)
@pytest.mark.parametrize("mu_dtype", ["float32", "int8", "int4"])
def test_an_einsum_kernel_is_updated_as_its_matrix(mu_dtype):
    """A kernel (heads, d, head_dim), and the matrix that it is."""
    kernel = jax.random.normal(jax.random.key(0), (16, 32, 24))
    rule = ByPath({"": FactoredAxes(row=(1,), col=(0, 2))})

    def last_update(leaf, rule):
        tx = came(1e-3, mu_dtype=mu_dtype, factoring=rule)
        state = tx.init(leaf)
        for _ in range(3):
            updates, state = tx.update(leaf, state, leaf)
        return updates

    def matrix(x):
        return jnp.moveaxis(x, 1, 0).reshape(32, 16 * 24)

    found = matrix(last_update(kernel, rule))
    expected = last_update(matrix(kernel), LastTwoAxes())
    close = np.isclose(found, expected, rtol=1e-5)
    # Sums in another order may move a code to its neighbour, but few of them.
    assert close.all() if mu_dtype == "float32" else np.mean(~close) < 0.01
    np.testing.assert_allclose(found, expected, atol=0.02 * np.abs(expected).max())


class SquareMatrices:
    """A user's own rule, which sees the path and may count axes from the end."""

    def axes(self, path, shape):
        if "odd" in jax.tree_util.keystr(path) or len(set(shape)) != 1:
            return None
        return FactoredAxes(row=(-2,), col=(np.int64(-1),))


def test_any_object_with_an_axes_method_is_a_rule():
    params = {"a": jnp.ones((4, 4)), "b": jnp.ones((4, 2)), "odd": jnp.ones((4, 4))}
    tx, published = came(1e-3, factoring=SquareMatrices()), came(1e-3)
    state = optax.tree.get(tx.init(params), "v_row")
    assert jax.tree.map(jnp.shape, state) == {"a": (4,), "b": (1,), "odd": (1,)}
    negative, _ = tx.update(params, tx.init(params))
    named, _ = published.update(params, published.init(params))
    np.testing.assert_array_equal(negative["a"], named["a"])


def test_dimension_numbers_are_a_rule():
    params = {"a": {"w": jnp.zeros((2, 3, 4)), "v": jnp.zeros(3)}, "b": jnp.zeros(4)}
    numbers = {"a": {"w": MuonDimensionNumbers(-2, (0, 2)), "v": None}, "b": None}
    for rule in (
        ByMuonDimensionNumbers(numbers),
        ByMuonDimensionNumbers(lambda _: numbers, params),
    ):
        assert rule.axes(path("a", "w"), (2, 3, 4)) == FactoredAxes((-2,), (0, 2))
        assert rule.axes(path("a", "v"), (3,)) is None
    prefix = ByMuonDimensionNumbers({"a": MuonDimensionNumbers(1, 2)})
    assert prefix.axes(path("a", "w"), (2, 3, 4)) == FactoredAxes((1,), (2,), (0,))
    assert prefix.axes(path("ab"), (2, 3, 4)) is None
    all_leaves = ByMuonDimensionNumbers(MuonDimensionNumbers())
    assert all_leaves.axes(path("a", "w"), (3, 4)) == FactoredAxes((0,), (1,))


def test_dimension_numbers_are_of_boxed_parameters_too():
    boxed = {"w": nn.Partitioned(jnp.zeros((2, 3, 4)), (None,) * 3)}

    def numbers(params):
        axes = MuonDimensionNumbers(np.int64(0), np.array([1, 2]))
        return jax.tree.map(lambda _: axes, params)

    rule = ByMuonDimensionNumbers(numbers, boxed)
    assert rule.axes(path("w"), (2, 3, 4)) == FactoredAxes((0,), (1, 2))


def path(*keys):
    return tuple(map(jax.tree_util.DictKey, keys))


@pytest.mark.parametrize(
    ("numbers", "error", "message"),
    [
        (lambda params: None, ValueError, "of a function needs params"),
        ({"a": (0, 1)}, TypeError, "has 0 at 'a/0'; allowed are MuonDimensionNumbers"),
    ],
)
def test_what_are_no_dimension_numbers_is_refused(numbers, error, message):
    with pytest.raises(error, match=message):
        ByMuonDimensionNumbers(numbers)

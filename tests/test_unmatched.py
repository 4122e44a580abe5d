"""A regular expression of a factoring rule that no leaf matches is warned of.

Caught is a misspelled one, of which nobody is told, and a warning where there is none.
"""

import warnings

import jax
import jax.numpy as jnp
import optax
import pytest
from optax.contrib import MuonDimensionNumbers

from came_optax import (
    BalancedSplit,
    ByMuonDimensionNumbers,
    ByPath,
    FactoredAxes,
    Stacked,
    came_muon,
    orthogonalize,
    state_memory,
    steady_came,
)

PARAMS = {"embed": jnp.ones((16, 8)), "layers": {"up": jnp.ones((3, 8, 16))}}
MISSPELT = {
    "where='layer/'": Stacked(BalancedSplit(), where="layer/"),
    "a key": ByPath({"layers/": Stacked(), "upp": FactoredAxes()}),
    "one within": Stacked(ByPath({"layers/down": BalancedSplit()}), where="layers/"),
    "the default": ByPath({}, default=Stacked(where="block")),
    "numbers": ByMuonDimensionNumbers(
        {"layers": MuonDimensionNumbers(1, 2), "embedding": MuonDimensionNumbers()}
    ),
}


@pytest.mark.parametrize("rule", MISSPELT.values(), ids=MISSPELT)
@pytest.mark.parametrize("make", [steady_came, came_muon])
def test_what_matches_no_leaf_is_warned_of_by_name(make, rule):
    tx = make(1e-3, factoring=rule)
    with pytest.warns(UserWarning, match="matches none of the leaves 'embed', 'lay"):
        jax.eval_shape(tx.init, PARAMS)


def test_other_uses_of_a_rule_warn_too():
    rule = Stacked(where="layer/")
    with pytest.warns(UserWarning, match=r"Stacked\(where=...\): 'layer/' matches"):
        orthogonalize(factoring=rule).init(PARAMS)
    with pytest.warns(UserWarning, match="matches none"):
        state_memory(steady_came(1e-3, factoring=rule), PARAMS)


def test_one_warning_a_mistake_at_the_line_that_makes_it():
    """However many transformations look: here none of them masks a leaf."""
    tx = came_muon(1e-3, factoring=Stacked(where="layer/"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        tx.init({"layers": {"up": jnp.ones((8, 16))}})
    assert [w.filename for w in caught] == [__file__]


def test_what_matches_is_not_warned_of():
    rule = Stacked(ByPath({"up": BalancedSplit()}), where="layers/")
    steady_came(1e-3, factoring=rule).init(PARAMS)
    came_muon(1e-3, factoring=rule).init(PARAMS)  # The rest has no layers.
    steady_came(1e-3, factoring=rule).init({})
    alone = optax.masked(
        steady_came(1e-3, factoring=rule), {"embed": True, "layers": False}
    )
    alone.init(PARAMS)

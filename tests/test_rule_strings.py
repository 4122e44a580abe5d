"""Rules as text, for command lines and configuration files: their own repr."""

import dataclasses
import json
import string

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given

from came_optax import (
    BalancedSplit,
    ByPath,
    FactoredAxes,
    LargestTwoAxes,
    LastTwoAxes,
    Stacked,
    came,
    scale_by_came,
    scale_by_confidence,
    scale_by_factored_moment,
)
from came_optax._factoring import as_rule

REGEXES = st.lists(
    st.sampled_from(["/layers/", r"\d+", "'", '"', "^a b$", "é", "\n", "\\\\", r"\x00"])
).map("".join)
AXES = st.lists(st.integers(-4, 4), max_size=2).map(tuple)
RULES = st.recursive(
    st.one_of(
        st.just(LastTwoAxes()),
        st.builds(LargestTwoAxes, st.integers(1, 10**6)),
        st.just(BalancedSplit()),
    ),
    lambda rules: st.one_of(
        st.builds(Stacked, rules, st.integers(-5, 5), REGEXES),
        st.builds(
            ByPath,
            st.dictionaries(
                REGEXES,
                st.one_of(rules, st.builds(FactoredAxes, AXES, AXES, AXES)),
                max_size=3,
            ),
            rules,
        ),
    ),
    max_leaves=5,
)


@given(RULES)
def test_the_repr_of_every_rule_is_read_back(rule):
    back = as_rule(repr(rule))
    assert back == rule
    assert hash(back) == hash(rule)
    assert as_rule(json.loads(json.dumps(repr(rule)))) == rule


def test_numpy_integers_are_read_back():
    axes = FactoredAxes((np.int64(0),), (np.int64(1),))
    rule = ByPath({"a": axes}, Stacked(LargestTwoAxes(np.int64(8)), np.int32(1)))
    assert as_rule(repr(rule)) == rule


@given(st.text(st.sampled_from(string.printable + "é\0"), max_size=30))
def test_any_other_text_is_refused(text):
    with pytest.raises((ValueError, TypeError), match=r"^factoring( must be|: column)"):
        as_rule(text)


@pytest.mark.parametrize(
    "make",
    [
        lambda rule: came(1e-3, factoring=rule),
        lambda rule: scale_by_came(factoring=rule),
        lambda rule: scale_by_factored_moment(factoring=rule),
        lambda rule: scale_by_confidence(factoring=rule),
        lambda rule: came(1e-3, factoring=Stacked(rule, axis=1, where="^none$")),
        lambda rule: came(1e-3, factoring=ByPath({"kernel": rule})),
        lambda rule: came(1e-3, factoring=ByPath({}, default=rule)),
        lambda rule: optax.inject_hyperparams(came)(1e-3, factoring=rule),
    ],
)
def test_accepted_wherever_a_rule_is(make):
    params = {"kernel": jnp.ones((4, 2, 3))}
    text, rule = (make(r).init(params) for r in ("BalancedSplit()", BalancedSplit()))
    default = make(LastTwoAxes()).init(params)
    assert [x.shape for x in jax.tree.leaves(text)] == [
        x.shape for x in jax.tree.leaves(rule)
    ]
    assert [x.shape for x in jax.tree.leaves(text)] != [
        x.shape for x in jax.tree.leaves(default)
    ]


@pytest.mark.parametrize(
    "text, message",
    [
        ("Stacked(Balanced())", r"column 9 .*: allowed are BalancedSplit.*'Balanced'"),
        ("Stacked(BalancedSplit)", r"column 9 .*did you mean 'BalancedSplit\(\)'"),
        ("Stacked(axis=1", r"column 8 of 'Stacked\(axis=1': '\(' was never closed"),
        ("Stacked(where='é', axis=len)", "column 25 .*'len' is not allowed"),
        ("Stacked(\n  axis='1')", r"column 1 .*Stacked\(axis=...\) must be an int"),
        ("Stacked(axes=1)", "column 1 .*unexpected keyword argument 'axes'"),
        ("Stacked(where='\\d')", r"column 1[56] .*invalid escape sequence"),
        ("Stacked(**{'axis': 1})", r"column 9 .*: \*\* is not allowed"),
        ("Stacked(where='a' + 'b')", "column 15 .*is not allowed"),
        ("ByPath({1: LastTwoAxes()})", "column 9 .*must be strings"),
        ("ByPath({**{}})", "column 1 .*must be strings"),
        ("__import__('os').system('x')", "column 1 .*allowed are BalancedSplit, "),
        ("(" * 1000, "column 201 .*too many nested"),
        ("9" * 5000, "column 1 .*"),
        ("\0", "column 1 .*null"),
        ("", "column 1 of '': invalid syntax"),
    ],
)
def test_errors_point_at_the_place(text, message):
    with pytest.raises(ValueError, match=f"^factoring: {message}"):
        came(1e-3, factoring=text)


@pytest.mark.parametrize("text", ["FactoredAxes()", "3", "'LastTwoAxes()'"])
def test_text_that_is_no_rule(text):
    with pytest.raises(
        TypeError, match=r"^factoring must be .*repr of a rule .*, got "
    ):
        came(1e-3, factoring=text)


def test_rules_may_be_static_arguments_and_replaced():
    rule = ByPath({"a": FactoredAxes((1,), (0, 2))}, Stacked(axis=1))
    f = jax.jit(lambda rule: len(rule.rules), static_argnums=0)
    assert f(rule) == f(as_rule(repr(rule))) == 1
    assert f._cache_size() == 1
    assert dataclasses.replace(rule, default=LastTwoAxes()).rules == rule.rules
    assert dataclasses.replace(Stacked(where="x"), axis=2) == Stacked(axis=2, where="x")

"""A warning about what a rule names and no leaf is."""

import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import optax

from came_optax._factored_axes import FactoringRule
from came_optax._factoring import ByPath, Stacked
from came_optax._muon_dimensions import ByMuonDimensionNumbers, is_within
from came_optax._paths import path_name, some_names
from came_optax._warning import warn


def warn_of_unmatched(rule: FactoringRule, params: Any) -> None:
    """Warns of a misspelled regular expression, which leaves all to another rule.

    Where some leaves are masked nothing is said: they may be what is meant.
    """
    leaves = jax.tree.leaves_with_path(params, is_leaf=_is_masked)
    paths = [path for path, _ in leaves]
    if not paths or any(_is_masked(leaf) for _, leaf in leaves):
        return
    names = [path_name(path) for path in paths]
    for argument, pattern, matches in _patterns(rule):
        if not any(matches(name, pattern) for name in names):
            warn(
                f"{argument} {pattern!r} matches none of the leaves {some_names(paths)}"
            )


def _patterns(rule: Any) -> Iterator[tuple[str, str, Callable[[str, str], bool]]]:
    """Yields what a rule has to find leaves by: of which argument, and how it does."""
    if isinstance(rule, Stacked):
        yield "Stacked(where=...):", rule.where, _is_found
        yield from _patterns(rule.rule)
    elif isinstance(rule, ByPath):
        for pattern, of_match in rule.rules:
            yield "ByPath(rules=...):", pattern, _is_found
            yield from _patterns(of_match)
        yield from _patterns(rule.default)
    elif isinstance(rule, ByMuonDimensionNumbers):
        for path, _ in rule.numbers:
            yield "ByMuonDimensionNumbers: a leaf at", path, is_within


def _is_found(name: str, pattern: str) -> bool:
    return re.search(pattern, name) is not None


def _is_masked(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)

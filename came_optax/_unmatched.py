"""A warning about regular expressions of a rule that no leaf's path matches."""

import re
from collections.abc import Iterator
from typing import Any

import jax
import optax

from came_optax._factored_axes import FactoringRule
from came_optax._factoring import ByPath, Stacked
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
    for argument, pattern in _patterns(rule):
        if not any(re.search(pattern, path_name(path)) for path in paths):
            warn(
                f"{argument} {pattern!r} matches none of the leaves {some_names(paths)}"
            )


def _patterns(rule: Any) -> Iterator[tuple[str, str]]:
    """Yields the regular expressions in a rule, and the arguments that they are of."""
    if isinstance(rule, Stacked):
        yield "Stacked(where=...):", rule.where
        yield from _patterns(rule.rule)
    elif isinstance(rule, ByPath):
        for pattern, of_match in rule.rules:
            yield "ByPath(rules=...):", pattern
            yield from _patterns(of_match)
        yield from _patterns(rule.default)


def _is_masked(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)

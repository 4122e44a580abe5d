"""Leaves by their paths: what they are called, and whose each array of a state is.

To rules, tables and errors alike, paths are those in a tree without boxes: ``kernel``,
not ``kernel/value``.
"""

from collections.abc import Container, Sequence
from typing import Any, TypeAlias

import jax

KeyPath: TypeAlias = tuple[Any, ...]
Shape: TypeAlias = tuple[int, ...]


def path_name(path: KeyPath) -> str:
    """Returns a key path as text, such as ``"params/dense/kernel"``."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def some_names(paths: Sequence[KeyPath]) -> str:
    """Returns the first names of leaves, for a message."""
    more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    return ", ".join(repr(path_name(path)) for path in paths[:3]) + more


def owner(path: KeyPath, params: Container[KeyPath]) -> tuple[KeyPath | None, str]:
    """Returns a state array's parameter, and the name of the field that it is part of.

    The parameter's path is the longest end of the array's own path that is one. Codes
    have a field more in theirs, before or after a box's.
    """
    ends = [path]
    for at in range(max(len(path) - 2, 0), len(path)):
        if _is_field_of_codes(path[at]):
            ends.append(path[:at] + path[at + 1 :])
    for i in range(len(path) + 1):
        for end in ends:
            if end[i:] in params:
                return end[i:], path_name(end[i - 1 : i])
    return None, ""


def _is_field_of_codes(key: Any) -> bool:
    fields = ("values", "row_scale", "col_scale")
    return isinstance(key, jax.tree_util.GetAttrKey) and key.name in fields

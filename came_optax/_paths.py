"""Leaves by their paths: what they are called, and whose each array of a state is.

To rules, tables and errors alike, paths are those in a tree without boxes: ``kernel``,
not ``kernel/value``.
"""

from collections.abc import Container
from typing import Any, TypeAlias

import jax

KeyPath: TypeAlias = tuple[Any, ...]
Shape: TypeAlias = tuple[int, ...]


def path_name(path: KeyPath) -> str:
    """Returns a key path as text, such as ``"params/dense/kernel"``."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def owner(path: KeyPath, params: Container[KeyPath]) -> tuple[KeyPath | None, str]:
    """Returns a state array's parameter, and the name of the field that it is part of.

    The parameter's path is the longest end of the array's own path that is one. Codes
    have a field more in theirs, before or after a box's.
    """
    plain = tuple(key for key in path[-2:] if not _is_field_of_codes(key))
    for whole in (path, path[:-2] + plain):
        for i in range(len(whole) + 1):
            if whole[i:] in params:
                return whole[i:], path_name(whole[i - 1 : i])
    return None, ""


def _is_field_of_codes(key: Any) -> bool:
    fields = ("values", "row_scale", "col_scale")
    return isinstance(key, jax.tree_util.GetAttrKey) and key.name in fields

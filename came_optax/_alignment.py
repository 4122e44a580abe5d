"""Which part of one optimizer's state takes the place of which part of another's.

A state is nested as its transformations are. What a parameter sees of it is a row of
parts, one for each transformation that it passes: ``chain`` puts them one after the
other, ``masked`` and ``partition`` leave some out, wrappers such as ``MultiSteps`` have
a part of their own before those that they wrap. Rows can be compared whatever the
nesting is.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import optax
from jax.tree_util import DictKey, GetAttrKey, SequenceKey

from came_optax._momentum import is_codes
from came_optax._paths import KeyPath, owner, path_name

# What wrappers call the states of what they wrap.
_WRAPPED = ("inner_state", "inner_states", "inner_opt_state")

Viewer: TypeAlias = KeyPath | None  # A parameter, or None for none in particular.


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """The state of one transformation, without those of what it wraps.

    Attributes:
      path: where it is in the whole state.
      node: the state.
      kept: the same with the axes of its parameter that each array has.
      viewers: the parameters that pass it, and None unless it is masked. A masked part
        without arrays of parameters doesn't tell: its own path.
    """

    path: KeyPath
    node: Any
    kept: Any
    viewers: frozenset[Viewer]

    @property
    def kind(self) -> type:
        """The state's class."""
        return jax.Array if isinstance(self.node, jax.Array) else type(self.node)

    @functools.cached_property
    def arrays(self) -> dict[KeyPath, Any]:
        """The state's arrays by their paths in it."""
        return dict(jax.tree.leaves_with_path(self.node))

    @functools.cached_property
    def leaves(self) -> dict[KeyPath, tuple[dict[str, Any], dict[str, Any]]]:
        """What each parameter has, and the axes of that, by the state's fields."""
        leaves: dict[KeyPath, Any] = collections.defaultdict(lambda: ({}, {}))
        for i, node in enumerate((self.node, self.kept)):
            for name, tree in node._asdict().items():
                if name == "count":
                    continue
                for path, x in jax.tree.leaves_with_path(tree, is_leaf=is_codes):
                    leaves[path][i][name] = x
        return leaves

    def __str__(self) -> str:
        place = f" at {path_name(self.path)!r}" if self.path else ""
        return self.kind.__name__ + place


def parts(state: Any, kept: Any, params: Mapping[KeyPath, Any]) -> list[Part]:
    """Returns the parts that hold arrays, in the order that updates pass them.

    Args:
      state: the state, without boxes.
      kept: the same with the axes that each array has; see ``kept_axes``.
      params: the parameters by their paths.
    """

    def walk(
        path: KeyPath, node: Any, kept: Any, viewers: frozenset[Viewer]
    ) -> Iterator[Part]:
        if isinstance(node, optax.MaskedState):
            owners = {owner(p, params)[0] for p, _ in jax.tree.leaves_with_path(node)}
            viewers = frozenset(owners - {None} or {path})
        nested = _nested(node)
        if not _is_chain(node):
            own = dict.fromkeys(key[0].name for key in nested)  # None: no arrays.
            own_node, own_kept = (x._replace(**own) if own else x for x in (node, kept))
            if jax.tree.leaves(own_node):
                yield Part(path, own_node, own_kept, viewers)
        for keys in nested:
            yield from walk(path + keys, _at(node, keys), _at(kept, keys), viewers)

    return list(walk((), state, kept, frozenset([*params, None])))


def align(
    old: Sequence[Part],
    new: Sequence[Part],
    params: Mapping[KeyPath, Any],
    family: Callable[[type], Hashable],
) -> list[dict[Viewer, Part]]:
    """Returns the old parts that each new one takes the place of, by who sees them.

    Args:
      old: the parts of a state.
      new: those of another.
      params: the parameters by their paths.
      family: what parts must have in common to take each other's place: of each
        family, the first takes the place of the first, the second of the second.

    Raises:
      ValueError: there are parts of a family in both, but not as many.
    """
    sources: list[dict[Viewer, Part]] = [{} for _ in new]
    viewers = [None, *params, *(viewer for part in new for viewer in part.viewers)]
    for viewer in dict.fromkeys(viewers):
        rows: list[dict[Hashable, list[int]]] = [{}, {}]
        for row, all_parts in zip(rows, (old, new), strict=True):
            for i, part in enumerate(all_parts):
                if viewer in part.viewers:
                    row.setdefault(family(part.kind), []).append(i)
        old_row, new_row = rows
        for name, places in new_row.items():
            others = old_row.get(name, [])
            if others and len(others) != len(places):
                raise ValueError(
                    "convert_state doesn't know which goes on in which: old has "
                    f"{_listed(old[i] for i in others)}, new "
                    f"{_listed(new[i] for i in places)}"
                )
            for i, j in zip(places, others, strict=False):
                sources[i][viewer] = old[j]
    return sources


def _listed(some: Iterator[Part]) -> str:
    return ", ".join(map(str, some))


def _is_chain(node: Any) -> bool:
    return type(node) in (tuple, list)


def _nested(node: Any) -> list[KeyPath]:
    """Returns where in a state those are that it chains or wraps."""
    if _is_chain(node):
        return [(SequenceKey(i),) for i in range(len(node))]
    found: list[KeyPath] = []
    for name in set(_WRAPPED) & set(getattr(node, "_fields", ())):
        inner = getattr(node, name)
        if isinstance(inner, Mapping):
            found += [(GetAttrKey(name), DictKey(label)) for label in inner]
        else:
            found.append((GetAttrKey(name),))
    return found


def _at(node: Any, keys: KeyPath) -> Any:
    for key in keys:
        node = (
            getattr(node, key.name)
            if isinstance(key, GetAttrKey)
            else node[key.idx if isinstance(key, SequenceKey) else key.key]
        )
    return node

"""Parameters in boxes, which say along which mesh axes an array is sharded.

Linen's ``nn.Partitioned``, NNX's variables and Haliax's ``NamedArray`` are pytree nodes
around one array that name each of its axes. A statistic has fewer axes than its
parameter, so that its box must name fewer. Boxes are known by their methods, as this
package does without Flax and Haliax.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from came_optax._kept_axes import kept_axes

# What NNX calls the names, in the metadata of a variable and of its optimizer state.
_NNX_NAMES = ("out_sharding", "sharding_names", "optimizer_sharding")


def unbox(tree: Any) -> Any:
    """Returns the tree with arrays in place of boxes."""
    return jax.tree.map(
        lambda x: jax.tree.leaves(x)[0] if _is_box(x) else x, tree, is_leaf=_is_box
    )


def open_empty(tree: Any) -> Any:
    """Returns the tree with masked leaves, which NNX boxes too, out of their boxes."""

    def is_empty(x: Any) -> bool:
        return _is_kind_of_box(x) and not jax.tree.leaves(x)

    def content(x: Any) -> Any:
        return jax.tree.leaves(x, is_leaf=lambda y: y is not x)[0]

    return jax.tree.map(
        lambda x: content(x) if is_empty(x) else x, tree, is_leaf=is_empty
    )


def box_like(boxed: Any, arrays: Any) -> Any:
    """Returns the leaves of ``arrays`` in the boxes of a tree that was unboxed."""
    return jax.tree.unflatten(jax.tree.structure(boxed), jax.tree.leaves(arrays))


def box_state(params: Any, init: Callable[[Any], Any]) -> Any:
    """Returns the state of parameters, in boxes like theirs.

    Args:
      params: the parameters, boxed or not.
      init: makes, of parameters without boxes, a NamedTuple of trees that have their
        structure (a leaf may be several arrays) and of an array named ``count``.
    """
    arrays = unbox(params)
    state: Any = init(arrays)
    if not any(map(_is_box, jax.tree.leaves(params, is_leaf=_is_box))):
        return state
    _, axes_of_state = kept_axes(init, arrays)

    def box_leaf(box: Any, leaf: Any, axes: Any) -> Any:
        if not _is_box(box):
            return leaf
        return jax.tree.map(lambda x, a: _rebox(box, x, a), leaf, axes)

    trees = {
        name: jax.tree.map(
            box_leaf,
            params,
            getattr(state, name),
            getattr(axes_of_state, name),
            is_leaf=_is_box,
        )
        for name in state._fields
        if name != "count"
    }
    return state._replace(**trees)


def _is_linen_box(x: Any) -> bool:
    return hasattr(x, "replace_boxed") and hasattr(x, "names")


def _is_nnx_variable(x: Any) -> bool:
    return hasattr(x, "get_metadata") and hasattr(x, "replace")


def _is_named_array(x: Any) -> bool:
    return hasattr(x, "resolve_axis") and hasattr(x, "axes")


def _is_kind_of_box(x: Any) -> bool:
    return _is_linen_box(x) or _is_nnx_variable(x) or _is_named_array(x)


def _is_box(x: Any) -> bool:
    return _is_kind_of_box(x) and len(jax.tree.leaves(x)) == 1


def _rebox(box: Any, x: jax.Array, axes: PartitionSpec) -> Any:
    """Returns ``x`` boxed like a parameter of which it has only some axes.

    Args:
      box: the parameter.
      x: an array.
      axes: for each axis of ``x`` the number of the parameter's axis, or None.
    """

    def pick(names: Any) -> Any:
        if isinstance(names, NamedSharding):
            return NamedSharding(names.mesh, pick(names.spec))
        kept = [names[int(a)] if a and int(a) < len(names) else None for a in axes]
        kept += [None] * (x.ndim - len(kept))
        is_spec = isinstance(names, PartitionSpec)
        return PartitionSpec(*kept) if is_spec else tuple(kept)

    if _is_named_array(box):
        return _named(box, x, axes)
    if _is_linen_box(box):
        return dataclasses.replace(box, value=x, names=pick(box.names))
    metadata = box.get_metadata()
    names = {name: metadata[name] for name in _NNX_NAMES if metadata.get(name)}
    return box.replace(x, **{name: pick(value) for name, value in names.items()})


def _named(box: Any, x: jax.Array, axes: PartitionSpec) -> Any:
    """Returns a ``NamedArray`` of some axes, but placeholders as they are."""
    numbers = [int(a) for a in axes if a]
    if len(numbers) != x.ndim:
        return x
    sized = (
        dataclasses.replace(box.axes[number], size=size)
        for number, size in zip(numbers, x.shape, strict=True)
    )
    return dataclasses.replace(box, array=x, axes=tuple(sized))

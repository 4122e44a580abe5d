"""Parameters in Flax's boxes, which say along which mesh axes an array is sharded.

Linen's ``nn.Partitioned`` and NNX's variables are pytree nodes around one array that
name each of its axes. A statistic has fewer axes than its parameter, so that its box
must name fewer. Boxes are known by their methods, as this package does without Flax.
"""

import dataclasses
from typing import Any

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec

from came_optax._sharding import trace_init

# What NNX calls the names, in the metadata of a variable and of its optimizer state.
_NNX_NAMES = ("out_sharding", "sharding_names", "optimizer_sharding")


def unboxed(
    tx: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
    """Lets a transformation of arrays take boxed ones, and boxes its state alike.

    Args:
      tx: a transformation whose state is a tuple of NamedTuples of trees that have the
        parameters' structure, or are single arrays named ``count``.
    """

    def init_fn(params: optax.Params) -> Any:
        arrays = _unbox(params)
        state: Any = tx.init(arrays)
        if not any(map(_is_box, jax.tree.leaves(params, is_leaf=_is_box))):
            return state
        axes = jax.tree.map(lambda p: PartitionSpec(*map(str, range(p.ndim))), arrays)
        _, axes_of_state = trace_init(tx.init, arrays, axes)

        def box_leaf(box: Any, statistics: Any, axes: Any) -> Any:
            if not _is_box(box):
                return statistics
            return jax.tree.map(lambda x, a: _rebox(box, x, a), statistics, axes)

        def box_field(name: str, tree: Any, axes: Any) -> Any:
            if name == "count":
                return tree
            return jax.tree.map(box_leaf, params, tree, axes, is_leaf=_is_box)

        def box_state(state: Any, axes: Any) -> Any:
            return type(state)(*map(box_field, state._fields, state, axes))

        return tuple(map(box_state, state, axes_of_state))

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, Any]:
        new_updates, new_state = tx.update(
            _unbox(updates), _unbox(state), _unbox(params), **extra_args
        )
        return _boxed_like(updates, new_updates), _boxed_like(state, new_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _is_linen_box(x: Any) -> bool:
    return hasattr(x, "replace_boxed") and hasattr(x, "names")


def _is_nnx_variable(x: Any) -> bool:
    return hasattr(x, "get_metadata") and hasattr(x, "replace")


def _is_box(x: Any) -> bool:
    is_box = _is_linen_box(x) or _is_nnx_variable(x)
    return is_box and len(jax.tree.leaves(x)) == 1


def _unbox(tree: Any) -> Any:
    """Returns the tree with arrays in place of boxes."""
    return jax.tree.map(
        lambda x: jax.tree.leaves(x)[0] if _is_box(x) else x, tree, is_leaf=_is_box
    )


def _boxed_like(boxed: Any, arrays: Any) -> Any:
    """Returns the leaves of ``arrays`` in the boxes of a tree that was unboxed."""
    return jax.tree.unflatten(jax.tree.structure(boxed), jax.tree.leaves(arrays))


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

    if _is_linen_box(box):
        return dataclasses.replace(box, value=x, names=pick(box.names))
    metadata = box.get_metadata()
    names = {name: metadata[name] for name in _NNX_NAMES if metadata.get(name)}
    return box.replace(x, **{name: pick(value) for name, value in names.items()})

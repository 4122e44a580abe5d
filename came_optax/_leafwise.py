"""Transformations of each leaf by itself, one leaf after the other."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from came_optax._boxes import unboxed
from came_optax._checks import check_inexact, check_same_leaves, check_state
from came_optax._factoring import (
    FactoredAxes,
    FactoringRule,
    as_rule,
    factored_axes,
)


class Leafwise(NamedTuple):
    """What a transformation does to each leaf.

    Attributes:
      made_by: the public function that makes the transformation, for errors.
      state_type: a NamedTuple of ``count``, the number of updates, and of trees with an
        array for each leaf.
      init: returns these arrays, given a parameter and its axes.
      update: returns the leaf's update, its new arrays and its turn, given its path,
        update, arrays and axes, the count with this update, and the turn before: see
        :func:`came_optax._statistics.in_turn`.
    """

    made_by: str
    state_type: Any
    init: Callable[[Any, FactoredAxes], tuple[jax.Array, ...]]
    update: Callable[..., tuple[jax.Array, tuple[jax.Array, ...], jax.Array]]


def transformation(
    part: Leafwise, factoring: FactoringRule
) -> optax.GradientTransformationExtraArgs:
    """Returns the transformation that does ``part`` to every leaf."""
    chain = chained(part, factoring=factoring)

    def init_fn(params: optax.Params) -> Any:
        state: Any = chain.init(params)
        return state[0]

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, Any]:
        state = (state, optax.EmptyState())
        updates, state = chain.update(updates, state, params, **extra_args)
        return updates, state[0]

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def chained(
    *parts: Leafwise, factoring: FactoringRule
) -> optax.GradientTransformationExtraArgs:
    """Returns the transformation that does all ``parts`` to a leaf, then to the next.

    ``optax.chain`` would do the first part to all leaves, and they would have left a
    CPU's cache before the second. The state is what it would be with an
    ``optax.identity`` after each part, as checkpoints have it.
    """
    factoring = as_rule(factoring)

    def init_fn(params: optax.Params) -> tuple[Any, ...]:
        check_inexact("params", params)
        treedef: Any = jax.tree.structure(params)
        leaves = jax.tree.leaves(params)
        axes = treedef.flatten_up_to(factored_axes(factoring, params))
        states = []
        for part in parts:
            arrays = [part.init(*leaf) for leaf in zip(leaves, axes, strict=True)]
            count = jnp.zeros([], jnp.int32)
            states.append(_to_state(part, count, treedef, arrays))
        return _with_empty_states(states)

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, tuple[Any, ...]]:
        del params, extra_args
        check_inexact("updates", updates)
        if len(state) != 2 * len(parts):
            names = " and ".join(part.made_by for part in parts)
            raise ValueError(
                f"the state of {names} must have {2 * len(parts)} parts as made by "
                f"init, got {len(state)}"
            )
        treedef: Any = jax.tree.structure(updates)
        leaves = jax.tree.leaves_with_path(updates)
        axes = treedef.flatten_up_to(factored_axes(factoring, updates))
        counts, arrays = [], []
        for part, of_part in zip(parts, state[::2], strict=True):
            check_state(of_part, part.state_type, part.made_by)
            count, *trees = of_part
            for tree in trees:
                check_same_leaves("updates", updates, "state", tree)
            counts.append(optax.safe_increment(count))
            arrays.append([*zip(*map(treedef.flatten_up_to, trees), strict=True)])
        new_leaves, turn = [], jnp.array(False)
        for i, (path, u) in enumerate(leaves):
            for part, count, of_part in zip(parts, counts, arrays, strict=True):
                u, of_part[i], turn = part.update(
                    path, u, of_part[i], axes[i], count, turn
                )
            new_leaves.append(u)
        states = [
            _to_state(part, count, treedef, of_part)
            for part, count, of_part in zip(parts, counts, arrays, strict=True)
        ]
        return treedef.unflatten(new_leaves), _with_empty_states(states)

    return unboxed(optax.GradientTransformationExtraArgs(init_fn, update_fn))


def _to_state(
    part: Leafwise,
    count: jax.typing.ArrayLike,
    treedef: Any,
    arrays: list[tuple[jax.Array, ...]],
) -> Any:
    """Returns the state in which each leaf has the given arrays."""
    number = len(part.state_type._fields) - 1
    trees = [
        treedef.unflatten([of_leaf[i] for of_leaf in arrays]) for i in range(number)
    ]
    return part.state_type(count, *trees)


def _with_empty_states(states: list[Any]) -> tuple[Any, ...]:
    return tuple(s for state in states for s in (state, optax.EmptyState()))

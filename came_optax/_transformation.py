"""From trees to leaves and back: what surrounds the algorithm.

On each update boxes are opened, everything is checked, gradients become float32 (or
wider), leaves are updated one after the other, and updates are rounded and
put back into boxes: each of these once.
"""

import functools
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import optax

from came_optax import _algorithm as algorithm
from came_optax import _boxes as boxes
from came_optax import _leaf as leaf
from came_optax import _momentum as momentum
from came_optax import _schedules as schedules
from came_optax._algorithm import Hyperparameters
from came_optax._checks import (
    check_count,
    check_inexact,
    check_params,
    check_same_leaves,
    check_state,
)
from came_optax._factored_axes import FactoringRule, check_rule, factored_axes
from came_optax._unmatched import warn_of_unmatched

Tree: TypeAlias = Any  # Of arrays, or of codes.
State: TypeAlias = Any


class TreeTransform(Protocol):
    """What is done to a tree without boxes, in the precision of its statistics.

    Attributes:
      made_by: the public function that makes the transformation, for errors.
      state_type: a NamedTuple of ``count`` and of trees with the parameters' structure.
      factoring: which axes of each leaf are rows and columns.
      to_params_dtype: whether updates are rounded to the parameters' dtype, where there
        are any, rather than to that of the updates that come in.
    """

    @property
    def made_by(self) -> str: ...
    @property
    def state_type(self) -> Any: ...
    @property
    def factoring(self) -> FactoringRule: ...
    @property
    def to_params_dtype(self) -> bool: ...

    def init(self, params: Tree) -> State:
        """Returns the state of parameters."""

    def update(self, updates: Tree, state: State) -> tuple[Tree, State]:
        """Returns the updates, unrounded, and the new state."""


class LeafTransform(NamedTuple):
    """Updates every leaf by the algorithm or by the same part of it.

    Attributes:
      made_by: see :class:`TreeTransform`.
      state_type: its trees are fields of a :class:`came_optax._leaf.Leaf`.
      hyperparameters: numbers, or arrays of shape ().
      bias_correction: whether averages are corrected for their start at zero.
      factoring: see :class:`TreeTransform`.
      mu_dtype: the name of the dtype that momentum is stored as.
      to_params_dtype: see :class:`TreeTransform`.
    """

    made_by: str
    state_type: Any
    hyperparameters: Hyperparameters
    bias_correction: bool
    factoring: FactoringRule
    mu_dtype: str = "float32"
    to_params_dtype: bool = False

    def init(self, params: Tree) -> State:
        """Returns the state of parameters without boxes."""
        fields = tuple(name for name in self.state_type._fields if name != "count")
        treedef: Any = jax.tree.structure(params)
        axes = treedef.flatten_up_to(factored_axes(self.factoring, params))
        leaves = [
            leaf.init(p, leaf_axes, self.mu_dtype, fields)
            for p, leaf_axes in zip(jax.tree.leaves(params), axes, strict=True)
        ]
        return _as_state(self.state_type, treedef, jnp.zeros([], jnp.int32), leaves)

    def update(self, updates: Tree, state: State) -> tuple[Tree, State]:
        """Returns updates in the precision of their statistics, and the new state."""
        treedef: Any = jax.tree.structure(updates)
        axes = treedef.flatten_up_to(factored_axes(self.factoring, updates))
        trees = {
            name: getattr(state, name) for name in state._fields if name != "count"
        }
        for tree in trees.values():
            check_same_leaves("updates", updates, "state", tree, momentum.is_codes)
        columns = [treedef.flatten_up_to(tree) for tree in trees.values()]
        check_count(state.count, self.made_by)
        count: jax.Array = jnp.asarray(optax.safe_increment(state.count))

        @functools.cache
        def numbers(dtype: Any) -> tuple[Hyperparameters, algorithm.Seen | None]:
            h = leaf.cast_hyperparameters(self.hyperparameters, dtype)
            corrected = self.bias_correction
            seen = algorithm.seen_after(count.astype(dtype), h) if corrected else None
            return h, seen

        new_updates, leaves, token = [], [], jnp.zeros([], jnp.float32)
        by_platform = tuple(schedules.BY_PLATFORM.items())
        for (path, g), leaf_axes, *arrays in zip(
            jax.tree.leaves_with_path(updates), axes, *columns, strict=True
        ):
            old = leaf.Leaf(**dict(zip(trees, arrays, strict=True)))
            dtype = leaf.arithmetic_dtype(old)
            u, new = leaf.upcast(g, dtype), old
            leaf.check(path, u, old, leaf_axes, self.mu_dtype)
            if u.size > 0:
                arguments = (u, old, *numbers(dtype), count, token)
                u, new = leaf.update(
                    *arguments, axes=leaf_axes, by_platform=by_platform
                )
                token = leaf.next_token(new, token)
            new_updates.append(u)
            leaves.append(new)
        return (
            treedef.unflatten(new_updates),
            _as_state(type(state), treedef, count, leaves),
        )


def transformation(
    transform: TreeTransform, *then: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """Returns the transformation that does the same to every leaf.

    Args:
      transform: what to do.
      *then: transformations that follow, of updates that aren't rounded yet. Each is
        given the parameters as the user gives them; the state is then a tuple, as that
        of ``optax.chain``.
    """
    check_rule(transform.factoring)
    rest: Any = optax.chain(*then) if then else None

    @functools.cache
    def kinds_of_rest() -> tuple[type, ...]:
        return tuple(map(type, jax.eval_shape(rest.init, {})))

    def init_fn(params: optax.Params) -> State:
        check_inexact("params", boxes.unbox(params))
        warn_of_unmatched(transform.factoring, boxes.unbox(params))
        state = boxes.box_state(params, transform.init)
        return (state, *rest.init(params)) if then else state

    def update_fn(
        updates: optax.Updates,
        state: State,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, State]:
        gradients, like = boxes.unbox(updates), boxes.unbox(params)
        check_inexact("updates", gradients)
        own, rest_state = _split(transform, state, len(then))
        if params is not None:
            check_inexact("params", like)
            check_params(like, gradients)
        rounds_to_params = transform.to_params_dtype and params is not None
        new, own_arrays = transform.update(gradients, boxes.unbox(own))
        if then:
            for part, kind in zip(rest_state, kinds_of_rest(), strict=True):
                check_state(part, kind, f"{transform.made_by}'s decay or learning rate")
            new, rest_state = rest.update(new, rest_state, params, **extra_args)
        # At the end: a large update may be infinite in float16 until the learning rate
        # makes it small.
        new = jax.tree.map(
            lambda u, x: u.astype(jax.dtypes.canonicalize_dtype(x.dtype)),
            new,
            like if rounds_to_params else gradients,
        )
        own = boxes.box_like(own, own_arrays)
        return boxes.box_like(updates, new), (own, *rest_state) if then else own

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _split(
    transform: TreeTransform, state: State, others: int
) -> tuple[State, tuple[Any, ...]]:
    """Returns the transform's state, and those of the transformations that follow."""
    if not others:
        check_state(state, transform.state_type, transform.made_by)
        return state, ()
    check_state(state, tuple, transform.made_by)
    if len(state) != 1 + others:
        raise ValueError(
            f"the state of {transform.made_by} must have {1 + others} parts as made by "
            f"init, got {len(state)}; convert_state takes over another optimizer's"
        )
    check_state(state[0], transform.state_type, transform.made_by)
    return state[0], tuple(state[1:])


def _as_state(
    state_type: Any, treedef: Any, count: jax.Array, leaves: list[leaf.Leaf]
) -> State:
    """Returns the state that holds some leaves' arrays, a tree a field."""
    trees = {
        name: treedef.unflatten([getattr(arrays, name) for arrays in leaves])
        for name in state_type._fields
        if name != "count"
    }
    return state_type(count=count, **trees)

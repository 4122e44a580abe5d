"""From trees to leaves and back: what surrounds the algorithm.

On each update boxes are opened, everything is checked, gradients become float32 (or
wider), leaves are updated one after the other, and updates go back to the parameters'
dtype and boxes: each of these once.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from came_optax import _boxes as boxes
from came_optax import _momentum as momentum
from came_optax import _schedules as schedules
from came_optax._algorithm import Factored, Hyperparameters
from came_optax._arrays import check_array, kept_shape, zeros
from came_optax._checks import (
    check_inexact,
    check_params,
    check_same_leaves,
    check_state,
)
from came_optax._codes import Codes, encode
from came_optax._factoring import (
    FactoredAxes,
    FactoringRule,
    check_rule,
    factored_axes,
)
from came_optax._paths import KeyPath

Tree: TypeAlias = Any  # Of arrays, or of codes.
State: TypeAlias = Any


class Rule(NamedTuple):
    """What is done to every leaf.

    Attributes:
      made_by: the public function that makes the transformation, for errors.
      state_type: a NamedTuple of ``count`` and of trees with the parameters' structure.
        The first half of the algorithm is done if there is a ``v`` among them, the
        second if there is a ``mu``, with confidence if there is an ``s_row``.
      hyperparameters: numbers, or arrays of shape ().
      bias_correction: whether averages are corrected for their start at zero.
      factoring: which axes of each leaf are rows and columns.
      mu_dtype: the name of the dtype that momentum is stored as.
    """

    made_by: str
    state_type: Any
    hyperparameters: Hyperparameters
    bias_correction: bool
    factoring: FactoringRule
    mu_dtype: str = "float32"


def transformation(
    rule: Rule, *then: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """Returns the transformation that does ``rule`` to every leaf.

    Args:
      rule: what to do.
      *then: what else is done to the updates before they are rounded to the
        parameters' dtype. Each is given the parameters as the user gives them; the
        state is then a tuple, as that of ``optax.chain``.
    """
    check_rule(rule.factoring)
    rest: Any = optax.chain(*then) if then else None

    def init_fn(params: optax.Params) -> State:
        check_inexact("params", params)
        state = boxes.box_state(params, functools.partial(_init, rule))
        return (state, *rest.init(params)) if then else state

    def update_fn(
        updates: optax.Updates,
        state: State,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, State]:
        check_inexact("updates", updates)
        own, rest_state = _split(rule, state, len(then))
        if params is not None:
            check_params(params, updates)
        like = updates if params is None else params
        new, own_arrays = _update(rule, boxes.unbox(updates), boxes.unbox(own))
        if then:
            new, rest_state = rest.update(new, rest_state, params, **extra_args)
        # At the end: a large update may be infinite in float16 until the learning rate
        # makes it small.
        new = jax.tree.map(
            lambda u, x: u.astype(jax.dtypes.canonicalize_dtype(x.dtype)),
            new,
            boxes.unbox(like),
        )
        own = boxes.box_like(own, own_arrays)
        return boxes.box_like(updates, new), (own, *rest_state) if then else own

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _split(rule: Rule, state: State, others: int) -> tuple[State, tuple[Any, ...]]:
    """Returns the rule's state and those of what is done then."""
    if not others:
        check_state(state, rule.state_type, rule.made_by)
        return state, ()
    check_state(state, tuple, rule.made_by)
    if len(state) != 1 + others:
        raise ValueError(
            f"the state of {rule.made_by} must have {1 + others} parts as made by "
            f"init, got {len(state)}"
        )
    check_state(state[0], rule.state_type, rule.made_by)
    return state[0], tuple(state[1:])


def _means(axes: FactoredAxes) -> dict[str, tuple[int, ...] | None]:
    """Returns the axes that each statistic is a mean over; None if a leaf lacks it."""
    row, col, whole = (axes.col, axes.row, None) if axes.factored else (None, None, ())
    return {"v_row": row, "v_col": col, "v": whole, "s_row": row, "s_col": col}


def _init(rule: Rule, params: Tree) -> State:
    """Returns the state of parameters without boxes."""
    treedef: Any = jax.tree.structure(params)
    axes = treedef.flatten_up_to(factored_axes(rule.factoring, params))

    def init_leaf(name: str, p: Any, axes: FactoredAxes) -> Any:
        if name == "mu":
            return momentum.init(p, axes, rule.mu_dtype)
        return zeros(p, _means(axes)[name])

    trees = {
        name: treedef.unflatten(
            [
                init_leaf(name, *leaf)
                for leaf in zip(jax.tree.leaves(params), axes, strict=True)
            ]
        )
        for name in rule.state_type._fields
        if name != "count"
    }
    return rule.state_type(count=jnp.zeros([], jnp.int32), **trees)


def _update(rule: Rule, updates: Tree, state: State) -> tuple[Tree, State]:
    """Returns updates in the precision of their statistics, and the new state."""
    treedef: Any = jax.tree.structure(updates)
    axes = treedef.flatten_up_to(factored_axes(rule.factoring, updates))
    trees = {name: getattr(state, name) for name in state._fields if name != "count"}
    for tree in trees.values():
        check_same_leaves("updates", updates, "state", tree, momentum.is_codes)
    columns = [treedef.flatten_up_to(tree) for tree in trees.values()]
    count: jax.Array = jnp.asarray(optax.safe_increment(state.count))
    before = count < 0  # False, but not to compilers.
    hyperparameters = functools.cache(functools.partial(_cast, rule.hyperparameters))
    new_leaves, leaves = [], []
    for (path, g), leaf_axes, *arrays in zip(
        jax.tree.leaves_with_path(updates), axes, *columns, strict=True
    ):
        leaf = dict(zip(trees, arrays, strict=True))
        _check_leaf(rule, path, g, leaf, leaf_axes)
        if g.size > 0:
            dtype = _precision(leaf)
            g, leaf, before = _update_leaf(
                _upcast(g, dtype),
                leaf,
                hyperparameters(dtype),
                count,
                count.astype(dtype) if rule.bias_correction else None,
                before,
                axes=leaf_axes,
                by_platform=tuple(schedules.BY_PLATFORM.items()),
            )
        new_leaves.append(g)
        leaves.append(leaf)
    new_trees = {
        name: treedef.unflatten([leaf[name] for leaf in leaves]) for name in trees
    }
    return treedef.unflatten(new_leaves), type(state)(count=count, **new_trees)


def _check_leaf(
    rule: Rule, path: KeyPath, g: Any, leaf: Mapping[str, Any], axes: FactoredAxes
) -> None:
    """Raises unless ``init`` makes such arrays for a leaf like ``g``."""
    means = _means(axes)
    for name, x in leaf.items():
        if name == "mu":
            momentum.check(path, x, g, axes, rule.mu_dtype)
        else:
            shape, dtypes = kept_shape(g.shape, means[name]), (jnp.float32, jnp.float64)
            check_array(name, path, x, shape, dtypes, g, "this factoring")


def _precision(leaf: Mapping[str, Any]) -> Any:
    """Returns the dtype of the arithmetic on a leaf with such arrays."""
    wide = (jnp.float64, jnp.complex128)
    is_wide = any(x.dtype in wide for x in jax.tree.leaves(dict(leaf)))
    return jnp.float64 if is_wide else jnp.float32


def _upcast(g: Any, dtype: Any) -> jax.Array:
    """Returns a gradient in the precision of a real dtype, complex if it was."""
    if jnp.iscomplexobj(g):
        dtype = jnp.complex128 if dtype == jnp.float64 else jnp.complex64
    upcast: jax.Array = jnp.asarray(g).astype(dtype)
    return upcast


def _cast(hyperparameters: Hyperparameters, dtype: Any) -> Hyperparameters:
    """Returns hyperparameters as arrays; until now Python numbers still are that."""
    cast: Hyperparameters = jax.tree.map(
        lambda x: x.astype(dtype) if isinstance(x, jax.Array) else np.asarray(x, dtype),
        hyperparameters,
    )
    return cast


# Inlined, as XLA:GPU fuses what was a call differently, and moves more memory.
@functools.partial(jax.jit, static_argnames=("axes", "by_platform"), inline=True)
def _update_leaf(
    g: jax.Array,
    leaf: dict[str, Any],
    h: Hyperparameters,
    count: jax.Array,
    t: jax.Array | None,
    before: jax.Array,
    *,
    axes: FactoredAxes,
    by_platform: Any,
) -> tuple[jax.Array, dict[str, Any], jax.Array]:
    """Returns one leaf's update, its arrays, and what is known when they are.

    It is traced once for each shape.
    """
    # A factored leaf has no use for its v, which is replicated.
    own = leaf["v"][0] < 0 if axes.factored and "v" in leaf else before
    token = schedules.Token(before, own)
    # Real numbers scale complex leaves.
    with jax.numpy_dtype_promotion("standard"):
        update, leaf = schedules.on_each_platform(
            functools.partial(_by_schedule, axes=axes),
            dict(by_platform),
            *(g, leaf, h, count, t, token),
        )
    # The leaf after this one waits until these small arrays are known.
    small = [leaf[name] for name in ("v_row", "s_row", "s_col") if name in leaf]
    if isinstance(leaf.get("mu"), Codes):
        small.append(leaf["mu"].row_scale)
    if axes.factored and small:
        before = schedules.known(*small)
    return update, leaf, before


def _by_schedule(
    schedule: schedules.Schedule,
    g: jax.Array,
    leaf: dict[str, Any],
    h: Hyperparameters,
    count: jax.Array,
    t: jax.Array | None,
    token: schedules.Token,
    *,
    axes: FactoredAxes,
) -> tuple[jax.Array, dict[str, Any]]:
    """Does both halves of the algorithm, or the one whose arrays there are."""
    leaf, u, v = dict(leaf), g, None
    if "v" in leaf:
        v = Factored(leaf["v_row"], leaf["v_col"]) if axes.factored else leaf["v"]
        u, v, token = schedule.normalize(u, v, h, axes, t, token)
        leaf |= {"v_row": v.row, "v_col": v.col} if axes.factored else {"v": v}
    if "mu" in leaf:
        s, stored = None, leaf["mu"]
        if axes.factored and "s_row" in leaf:
            s = Factored(leaf["s_row"], leaf["s_col"])
        if isinstance(stored, Codes):
            values = schedule.stage(stored.values, v, token)
            stored = stored._replace(values=values)
        old_m, of_u = momentum.load(stored, u, axes), u
        coded = isinstance(stored, Codes)
        u, m, s, token = schedule.confide(of_u, old_m, s, h, axes, t, token, coded)
        if isinstance(stored, Codes):
            passes = schedule.passes(m, old_m, of_u, h.b1)
            leaf["mu"] = encode(m, passes, axes, stored.bits, count)
        else:
            leaf["mu"] = m.astype(stored.dtype)
        if s is not None:
            leaf |= {"s_row": s.row, "s_col": s.col}
    return u, leaf

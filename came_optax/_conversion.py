"""A running job's state as that of another optimizer."""

from __future__ import annotations

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax

from came_optax import _boxes as boxes
from came_optax._arrays import real_dtype, wide_dtype
from came_optax._came import ScaleByCameState
from came_optax._checks import check_same_leaves
from came_optax._codes import Codes, decode, encode
from came_optax._factoring import FactoredAxes
from came_optax._kept_axes import kept_axes, lost_axes
from came_optax._momentum import is_codes
from came_optax._paths import KeyPath, owner, path_name

_LONG_AGO = 10**7  # Updates, after which no average is corrected for its start.

Leaf: TypeAlias = dict[str, Any]  # What a part of the state holds for a parameter.


def convert_state(
    state: optax.OptState,
    params: optax.Params,
    *,
    old: optax.GradientTransformation,
    new: optax.GradientTransformation,
) -> optax.OptState:
    r"""Returns the state of another optimizer that goes on where a job is.

    From a CAME to one with another ``mu_dtype`` or ``factoring``: momentum is decoded
    and stored anew, statistics are those of their outer product, or copied where the
    rule reads a leaf as before. From Adam (whatever has an
    ``optax.ScaleByAdamState``), whose momentum averages gradients where CAME's averages
    gradients over their root mean square:

    - the second moment's rows and columns are means of ``nu``;
    - momentum is :math:`\mu / \sqrt{\nu}`, with a root mean square of at most 1;
    - the instability is 1 everywhere: no confidence yet, updates are momentum;
    - CAME's count is 10⁷: averages that did not start at zero are not to be corrected.

    Other step counts, and with them learning rate schedules, go on. So does what both
    have beside, such as accumulated gradients. The rest is as ``new.init`` makes it,
    injected hyperparameters among it.

    Args:
      state: the state.
      params: the parameters.
      old: the optimizer that ``state`` is of.
      new: the optimizer that it is to be of.

    Returns:
      A state of ``new``. Under ``jax.jit`` with ``out_shardings`` from
      :func:`state_sharding` it is made where it belongs.

    Raises:
      ValueError: ``state`` is not one of ``old``, or nothing in it can be converted.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from came_optax import convert_state, steady_came
      >>> params = {"kernel": jnp.ones((64, 64))}
      >>> adamw, came = optax.adamw(1e-3), steady_came(1e-3, mu_dtype="int8")
      >>> _, state = adamw.update(params, adamw.init(params), params)
      >>> state = convert_state(state, params, old=adamw, new=came)
      >>> updates, state = came.update(params, state, params)
      >>> optax.tree.get(state, "mu")["kernel"].values.dtype
      dtype('int8')
    """
    arrays = boxes.unbox(params)
    shapes, old_kept = kept_axes(old.init, arrays)
    _, new_kept = kept_axes(new.init, arrays)
    boxed = new.init(params)
    state, fresh = boxes.unbox(state), boxes.unbox(boxed)
    _check_state_of_old(state, shapes)
    parts, new_parts = _parts(state), _parts(fresh)
    if not all(isinstance(part, ScaleByCameState) for part in new_parts):
        raise ValueError("new must be made of scale_by_came, not of scale_by_adam")
    if len(parts) != len(new_parts) or not parts:
        raise ValueError(
            "convert_state needs as many scale_by_came in new as there are "
            f"scale_by_came and scale_by_adam in old, got {len(new_parts)} and "
            f"{len(parts)}"
        )
    count = parts[0].count
    paths = dict(jax.tree.leaves_with_path(arrays))
    converted = (
        _convert_part(*part, paths)
        for part in zip(
            parts, _parts(old_kept), new_parts, _parts(new_kept), strict=True
        )
    )
    others = {_name(path, paths): x for path, x in jax.tree.leaves_with_path(state)}

    def choose(path: KeyPath, x: Any) -> Any:
        if _is_part(x):
            return next(converted)
        name = _name(path, paths)
        if name[-1] == "count":
            return count
        found = others.get(name)
        is_injected = any(_field(key) == "hyperparams" for key in path)
        return x if is_injected or _types(found) != _types(x) else found

    new_state: Any = jax.tree.map_with_path(choose, fresh, is_leaf=_is_part)
    reboxed: optax.OptState = boxes.box_like(boxed, new_state)
    return reboxed


def _is_part(x: Any) -> bool:
    return isinstance(x, ScaleByCameState | optax.ScaleByAdamState)


def _parts(state: Any) -> list[Any]:
    return [x for x in jax.tree.leaves(state, is_leaf=_is_part) if _is_part(x)]


def _field(key: Any) -> str | None:
    return key.name if isinstance(key, jax.tree_util.GetAttrKey) else None


def _name(path: KeyPath, params: dict[KeyPath, Any]) -> tuple[KeyPath | None, str]:
    """Returns a state array's parameter, if it has one, and its field."""
    param, field = owner(path, params)
    return param, field if param is not None else path_name(path[-1:])


def _check_state_of_old(state: Any, shapes: Any) -> None:
    """Raises unless a state is as ``old.init`` makes it."""
    structures: list[Any] = [jax.tree.structure(tree) for tree in (state, shapes)]
    if structures[0] != structures[1]:
        raise ValueError(
            f"state is not one of old: it is structured as {structures[0]}, and that "
            f"of old as {structures[1]}"
        )

    def check(path: KeyPath, x: Any, like: Any) -> None:
        if x.shape != like.shape:
            raise ValueError(
                f"state is not one of old: {path_name(path)!r} has shape {x.shape}, "
                f"and in old {like.shape}"
            )

    jax.tree.map_with_path(check, state, shapes)


def _leaves(part: Any) -> list[dict[str, Any]]:
    """Returns the arrays of each leaf of a part, or what else is in their places."""
    fields = part._asdict()
    del fields["count"]
    treedef: Any = jax.tree.structure(fields["nu" if "nu" in fields else "v"])
    columns = [treedef.flatten_up_to(tree) for tree in fields.values()]
    return [dict(zip(fields, leaf, strict=True)) for leaf in zip(*columns, strict=True)]


def _convert_part(
    old: Any, old_kept: Any, new: Any, new_kept: Any, params: dict[KeyPath, Any]
) -> Any:
    """Returns a :class:`ScaleByCameState` that goes on where ``old`` is."""
    tree: Any = jax.tree.structure(new.v)
    check_same_leaves("state of new", new.v, "state of old", old.mu, is_codes)
    if isinstance(old, ScaleByCameState):
        count, s = old.count, _mean_instability(old, old_kept)
    else:
        count, s = jnp.array(_LONG_AGO, jnp.int32), jnp.ones([])
    converted = [
        _convert_leaf(params[path], leaf, kept, new_leaf, new_leaf_kept, count, s)
        for (path, _), leaf, kept, new_leaf, new_leaf_kept in zip(
            jax.tree.leaves_with_path(new.v),
            *map(_leaves, (old, old_kept, new, new_kept)),
            strict=True,
        )
    ]
    trees = {
        name: tree.unflatten([leaf[name] for leaf in converted])
        for name in new._fields
        if name != "count"
    }
    return new._replace(count=count, **trees)


def _mean_instability(state: Any, kept: Any) -> jax.Array:
    """Returns the mean over the leaves that have one, 1 if none has.

    For leaves that have none as yet: as far from its start at zero as theirs.
    """
    means = [
        jnp.mean(leaf["s_row"])
        for leaf, axes in zip(_leaves(state), _leaves(kept), strict=True)
        if axes["s_row"]
    ]
    return jnp.mean(jnp.array(means)) if means else jnp.ones([])


def _convert_leaf(
    p: jax.Array,
    old: Leaf,
    old_kept: Leaf,
    new: Leaf,
    new_kept: Leaf,
    count: Any,
    new_s: jax.Array,
) -> Leaf:
    """Returns the arrays of a leaf, read as another matrix and with other momentum.

    Args:
      p: the parameter.
      old: its arrays in the old state.
      old_kept: the axes of the parameter that each of them has.
      new: its arrays as the new optimizer's ``init`` makes them.
      new_kept: the axes that each of those has.
      count: the new state's.
      new_s: the instability, if it has none so far.
    """
    if "nu" in old:
        v, s = old["nu"].astype(real_dtype(p.dtype)), None
        m = old["mu"].astype(wide_dtype(p.dtype))
        m = m * jnp.where(v > 0, jax.lax.rsqrt(jnp.where(v > 0, v, 1)), 0)
        m = m / jnp.maximum(1, jnp.sqrt(jnp.mean(jnp.abs(m) ** 2)))
    else:
        v, s = (_whole(name, p, old, old_kept) for name in ("v", "s"))
        m = _load(p, old["mu"], old_kept["mu"])
    leaf = dict(new)
    if not new_kept["v_row"]:
        leaf["v"] = v
    else:
        s = jnp.full_like(v, new_s) if s is None else s
        for name, whole in ("v", v), ("s", s):
            for side in ("row", "col"):
                field = f"{name}_{side}"
                leaf[field] = jnp.mean(whole, lost_axes(p.ndim, new_kept[field]))
    leaf["mu"] = _store(m, new["mu"], new_kept["mu"], count)
    if "nu" in old:
        return leaf
    unchanged = {
        name: x  # To the last bit.
        for name, x in old.items()
        if old_kept[name] == new_kept[name] and _types(x) == _types(new[name])
    }
    return leaf | unchanged


def _whole(name: str, p: jax.Array, leaf: Leaf, kept: Leaf) -> jax.Array | None:
    """Returns a statistic of each element, in a matrix as the outer product has it.

    None for the instability of a leaf that isn't factored.
    """
    if not kept["v_row"]:
        return leaf.get(name)
    over_col, over_row = (
        lost_axes(p.ndim, kept[f"v_{side}"]) for side in ("row", "col")
    )
    row = jnp.expand_dims(leaf[f"{name}_row"], over_col)
    col = jnp.expand_dims(leaf[f"{name}_col"], over_row)
    mean = jnp.mean(row, over_row, keepdims=True)
    whole: jax.Array = row / jnp.where(mean > 0, mean, 1) * col
    return whole


def _load(p: jax.Array, stored: Any, kept: Any) -> jax.Array:
    if isinstance(stored, Codes):
        return decode(stored, p, _axes_of_codes(p, kept))
    array: jax.Array = stored.astype(wide_dtype(p.dtype))
    return array


def _store(m: jax.Array, like: Any, kept: Any, count: jax.Array) -> Any:
    if isinstance(like, Codes):
        return encode(lambda: m, _axes_of_codes(m, kept), like.bits, count)
    return m.astype(like.dtype)


def _axes_of_codes(p: jax.Array, kept: Codes) -> FactoredAxes:
    over_col = lost_axes(p.ndim, kept.row_scale)
    if not kept.col_scale:  # A vector, or a stack of them.
        return FactoredAxes(stack=tuple(a for a in range(p.ndim) if a not in over_col))
    return FactoredAxes(lost_axes(p.ndim, kept.col_scale), over_col)


def _types(x: Any) -> Any:
    return jax.tree.map(jax.typeof, x)

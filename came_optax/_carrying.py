"""Parts of a state that go on as they are, and the counts of schedules."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import GetAttrKey

from came_optax._alignment import Part, Viewer
from came_optax._boxes import unbox
from came_optax._paths import KeyPath, owner, path_name

# What counts the steps of a learning rate's schedule.
COUNTING = (optax.ScaleByScheduleState, optax.InjectStatefulHyperparamsState)


def carry(
    part: Part,
    sources: Mapping[Viewer, Part],
    params: Mapping[KeyPath, Any],
    given_in_old: Mapping[KeyPath, jax.Array],
) -> Iterator[tuple[KeyPath, Any]]:
    """Yields the arrays that a part has of the old ones, by their paths in it.

    Hyperparameters that the new optimizer sets otherwise than the old are its own.
    """
    first = next(iter(sources.values()))
    for path, like in part.arrays.items():
        param, _ = owner(path, params)
        source = first if param is None else sources.get(param)
        if source is None:
            continue
        if source.kind is part.kind and path in source.arrays:
            x = source.arrays[path]
            _check_alike(part.path + path, x, like)
            if _is_hyperparameter(path):
                x = jnp.where(given_in_old[source.path + path] == like, x, like)
            yield path, cast(x, like.dtype)
        elif _is_hyperparameter(path):
            yield path, like
        elif part.kind in COUNTING and path[-1] == GetAttrKey("count"):
            yield path, source.node.count


def cast(x: jax.Array, dtype: Any) -> jax.Array:
    """Returns an array of that dtype: the same, if it can be."""
    return x if x.dtype == dtype else x.astype(dtype)


def given_hyperparameters(
    tx: optax.GradientTransformation, params: Any, paths: Iterable[KeyPath]
) -> dict[KeyPath, jax.Array]:
    """Returns what injected hyperparameters are at first, by their paths."""
    injected = [path for path in paths if _is_hyperparameter(path)]

    def init(params: Any) -> list[jax.Array]:
        state = dict(jax.tree.leaves_with_path(unbox(tx.init(params))))
        return [state[path] for path in injected]

    values = jax.jit(init)(params) if injected else []
    return dict(zip(injected, values, strict=True))


def _is_hyperparameter(path: KeyPath) -> bool:
    return GetAttrKey("hyperparams") in path


def _check_alike(path: KeyPath, x: Any, like: Any) -> None:
    """Raises if an array that has no other meaning here can't be another."""
    kinds = [jnp.floating, jnp.complexfloating, jnp.bool_]
    if x.shape == ():  # Others than counts may be in units of their last bit.
        kinds.append(jnp.integer)
    castable = any(all(jnp.issubdtype(a.dtype, k) for a in (x, like)) for k in kinds)
    if x.shape != like.shape or not (castable or x.dtype == like.dtype):
        raise ValueError(
            f"{path_name(path)!r} is {like.dtype} of shape {like.shape} in new, and "
            f"{x.dtype} of shape {x.shape} in old"
        )

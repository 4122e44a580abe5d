"""Errors that name the argument or the leaf, the value given and what is allowed."""

import contextlib
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from came_optax._boxes import unbox
from came_optax._paths import KeyPath, path_name, some_names


def check_scalar(
    name: str,
    value: Any,
    *,
    at_least: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> None:
    """Raises unless a Python number lies in range after rounding to float32.

    The values of arrays pass unvalidated, as they may be traced; but not 16 bits, where
    a decay rate of 0.999 would be 1.
    """
    if isinstance(value, np.ndarray) and value.shape == ():
        value = value[()]
    if isinstance(value, jax.Array | np.ndarray):
        floating = jnp.issubdtype(value.dtype, jnp.floating)
        if not floating and not jnp.issubdtype(value.dtype, jnp.integer):
            raise TypeError(f"{name} must be a real number, got dtype {value.dtype}")
        if value.shape != ():
            raise ValueError(f"{name} must be a scalar, got shape {value.shape}")
        if floating and jnp.finfo(value.dtype).bits < 32:
            raise ValueError(
                f"{name} is a {value.dtype} array; allowed are float32 and wider (with "
                "optax.inject_hyperparams: pass hyperparam_dtype=jnp.float32)"
            )
        return
    if isinstance(value, np.generic) and jnp.issubdtype(value.dtype, jnp.floating):
        value = float(value)  # A scalar of ml_dtypes is no np.number.
    real = int | float | np.floating | np.integer
    if isinstance(value, bool) or not isinstance(value, real):
        hint = " (for a schedule, use optax.inject_hyperparams)"
        allowed = "a number or an array"
        if name == "learning_rate":
            allowed = "a number, an array or a schedule"
        raise TypeError(
            f"{name} must be {allowed}, got {value!r}{hint if callable(value) else ''}"
        )
    bounds = [
        (">=", at_least, np.greater_equal),
        (">", above, np.greater),
        ("<", below, np.less),
    ]
    given = [(sign, bound, holds) for sign, bound, holds in bounds if bound is not None]
    try:
        rounded: Any = np.float32(value)
    except OverflowError:  # An int that is no float.
        rounded = np.inf if value > 0 else -np.inf
    if not all(holds(rounded, bound) for _, bound, holds in given):
        allowed = " and ".join(f"{sign} {bound:g}" for sign, bound, _ in given)
        raise ValueError(f"{name} must be {allowed} (in float32), got {value!r}")


def check_learning_rate(learning_rate: Any) -> None:
    """Raises unless it is a schedule or a number ≥ 0."""
    if not callable(learning_rate):
        check_scalar("learning_rate", learning_rate, at_least=0, below=np.inf)


def check_decay(name: str, value: Any) -> None:
    """Raises unless ``value`` is a decay rate of an exponential moving average."""
    check_scalar(name, value, at_least=0, below=1)


def check_epsilon(name: str, value: Any) -> None:
    """Raises unless ``value`` times any 1 − β is a normal number in float32."""
    check_scalar(name, value, at_least=1e-30, below=np.inf)


def check_threshold(name: str, value: Any) -> None:
    """Raises unless ``value`` is positive or None."""
    if value is not None:
        check_scalar(name, value, above=0, below=np.inf)


def check_flag(name: str, value: Any) -> None:
    """Raises unless ``value`` is a Python bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_regex(name: str, pattern: Any) -> None:
    """Raises unless ``pattern`` is a regular expression."""
    must_be = f"{name} must be a regular expression, got {pattern!r}"
    if not isinstance(pattern, str):
        raise ValueError(must_be)
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{must_be}: {error}") from error


def is_int(value: Any) -> bool:
    """Returns whether ``value`` is a Python or NumPy int, and no bool."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def as_dtype(dtype: Any) -> Any:
    """Returns a dtype, given as such or by its name; None of what is no dtype."""
    if not isinstance(dtype, jax.Array):
        with contextlib.suppress(TypeError):
            return jnp.dtype(dtype)
    return None


def call_hint(dtype: Any) -> str:
    """Returns what to add to an error about a dtype that was called."""
    by_name = " (optax.inject_hyperparams calls a dtype: give its name)"
    return by_name if isinstance(dtype, jax.Array) else ""


def checked_mask(name: str, mask: Any, params: Any) -> Any:
    """Returns a tree of bools structured as the parameters without boxes.

    Args:
      name: the argument's.
      mask: such a tree, or a prefix of one, in boxes or not; or a function from
        parameters to one. A module is a tree, even if it can be called.
      params: the parameters, as the function is to see them.

    Raises:
      TypeError: something in it is no bool.
      ValueError: it has another structure.
    """
    if callable(mask) and all(map(callable, jax.tree.leaves(mask))):
        mask = mask(params)
    mask, arrays = unbox(mask), unbox(params)
    for path, leaf in jax.tree.leaves_with_path(mask):
        if not isinstance(leaf, bool | np.bool_):
            at = f" at {path_name(path)!r}" if path else ""
            raise TypeError(
                f"{name} must be a tree of bools or a function that returns one, got "
                f"{leaf!r}{at}"
            )
    return broadcast(name, mask, arrays)


def broadcast(
    name: str, prefix: Any, params: Any, is_leaf: Callable[[Any], bool] | None = None
) -> Any:
    """Returns a tree structured as the parameters, of one or of a prefix.

    Raises:
      ValueError: an argument, by its name, has another structure.
    """
    try:
        return jax.tree.broadcast(prefix, params, is_leaf=is_leaf)
    except ValueError as error:
        raise ValueError(f"{name} does not fit the parameters: {error}") from error


def check_inexact(what: str, tree: Any) -> None:
    """Raises if a leaf of ``tree`` is not an array of real or complex numbers."""

    def check(path: KeyPath, leaf: Any) -> None:
        is_array = hasattr(leaf, "dtype") and hasattr(leaf, "shape")
        if not is_array or not jnp.issubdtype(leaf.dtype, jnp.inexact):
            kind = f"dtype {leaf.dtype}" if is_array else f"type {type(leaf).__name__}"
            raise TypeError(
                f"leaf {path_name(path)!r} of the {what} has {kind}; allowed are "
                "arrays of floating point or complex numbers (optax.masked and "
                "optax.partition leave others out, eqx.filter(model, "
                "eqx.is_inexact_array) those of an Equinox model)"
            )

    jax.tree.map_with_path(check, tree)


def check_same_leaves(
    what: str,
    tree: Any,
    other_what: str,
    other: Any,
    is_leaf: Callable[[Any], bool] | None = None,
) -> None:
    """Raises if two trees differ in structure."""
    structures: list[Any] = [jax.tree.structure(t, is_leaf) for t in (tree, other)]
    if structures[0] == structures[1]:
        return
    paths, other_paths = (
        {path_name(path) for path, _ in jax.tree.leaves_with_path(t, is_leaf)}
        for t in (tree, other)
    )
    if paths - other_paths:
        leaf, there, absent = min(paths - other_paths), what, other_what
    elif other_paths - paths:
        leaf, there, absent = min(other_paths - paths), other_what, what
    else:
        raise ValueError(f"{what} and {other_what} {difference(tree, other, is_leaf)}")
    raise ValueError(f"leaf {leaf!r} is in the {there} but not in the {absent}")


def difference(
    tree: Any,
    other: Any,
    is_leaf: Callable[[Any], bool] | None = None,
    place: KeyPath = (),
) -> str:
    """Says where two trees first have different nodes, or nothing if nowhere."""

    def one_level(tree: Any) -> tuple[list[tuple[KeyPath, Any]], Any]:
        return jax.tree.flatten_with_path(
            tree, lambda x: x is not tree or (is_leaf is not None and is_leaf(x))
        )

    def node(tree: Any) -> str:
        paths = [path for path, _ in one_level(tree)[0]]
        kind = type(tree).__name__
        return "a leaf" if paths == [()] else f"{kind}({some_names(paths)})"

    (children, kind), (others, other_kind) = one_level(tree), one_level(other)
    if kind != other_kind:
        at = f" at {path_name(place)!r}" if place else ""
        return f"differ{at}: {node(tree)} and {node(other)}"
    for (key, child), (_, its_other) in zip(children, others, strict=True):
        if key and (found := difference(child, its_other, is_leaf, place + key)):
            return found
    return ""


def check_params(params: Any, updates: Any) -> None:
    """Raises if parameters and updates differ in structure or shapes."""
    check_same_leaves("params", params, "updates", updates)

    def check(path: KeyPath, p: Any, u: Any) -> None:
        if p.shape != u.shape:
            raise ValueError(
                f"leaf {path_name(path)!r} has shape {p.shape} in the params and "
                f"{u.shape} in the updates"
            )

    jax.tree.map_with_path(check, params, updates)


def check_count(count: Any, made_by: str) -> None:
    """Raises unless a state's count is one integer."""
    if jnp.shape(count) != () or not jnp.issubdtype(
        jnp.result_type(count), jnp.integer
    ):
        raise TypeError(
            f"count in the state of {made_by} must be an integer of shape (), got "
            f"{jnp.result_type(count)} of shape {jnp.shape(count)}"
        )


def check_state(state: Any, cls: type, made_by: str) -> None:
    """Raises unless ``state`` is a ``cls``."""
    if not isinstance(state, cls):
        hint = "convert_state takes over Adam's, and other options'"
        if type(state) in (tuple, list, dict):
            hint = (
                "restore checkpoints into what init makes, and take over another "
                "optimizer's by convert_state"
            )
        raise TypeError(
            f"the state of {made_by} must be a {cls.__name__} as made by init, got a "
            f"{type(state).__name__}; {hint}"
        )

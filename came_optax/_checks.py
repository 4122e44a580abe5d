"""Errors that name the argument or the leaf, the value given and what is allowed."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

KeyPath = tuple[Any, ...]
Shape = tuple[int, ...]


def path_name(path: KeyPath) -> str:
    """Returns a key path as text, such as ``"params/dense/kernel"``."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def check_scalar(
    name: str,
    value: Any,
    *,
    at_least: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> None:
    """Raises unless a Python number lies in range after rounding to float32.

    Arrays pass unvalidated, as they may be traced; but not in 16 bits, where 0.9999
    would be 1.
    """
    if isinstance(value, jax.Array | np.ndarray):
        if jnp.finfo(value.dtype).bits < 32:
            raise ValueError(
                f"{name} is a {value.dtype} array, which cannot tell it from 0 or 1; "
                "allowed are float32 and wider (with optax.inject_hyperparams: pass "
                "hyperparam_dtype=jnp.float32)"
            )
        return
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        raise TypeError(
            f"{name} must be a number or an array, got {value!r} (for a schedule, use "
            "optax.inject_hyperparams)"
        )
    bounds = [
        (">=", at_least, np.greater_equal),
        (">", above, np.greater),
        ("<", below, np.less),
    ]
    given = [(sign, bound, holds) for sign, bound, holds in bounds if bound is not None]
    if not all(holds(np.float32(value), bound) for _, bound, holds in given):
        allowed = " and ".join(f"{sign} {bound:g}" for sign, bound, _ in given)
        raise ValueError(f"{name} must be {allowed} (in float32), got {value!r}")


def check_decay(name: str, value: Any) -> None:
    """Raises unless ``value`` is a decay rate of an exponential moving average."""
    check_scalar(name, value, at_least=0, below=1)


def check_positive(name: str, value: Any) -> None:
    """Raises unless ``value`` is positive."""
    check_scalar(name, value, above=0, below=np.inf)


def check_threshold(name: str, value: Any) -> None:
    """Raises unless ``value`` is positive or None."""
    if value is not None:
        check_positive(name, value)


def check_inexact(params: Any) -> None:
    """Raises if a leaf of ``params`` is not an array of real or complex numbers."""

    def check(path: KeyPath, leaf: Any) -> None:
        dtype = getattr(leaf, "dtype", type(leaf).__name__)
        if not jnp.issubdtype(dtype, jnp.inexact):
            raise TypeError(
                f"leaf {path_name(path)!r} has dtype {dtype}; allowed are arrays "
                "of floating point or complex numbers (optax.masked and "
                "optax.partition leave others out)"
            )

    jax.tree.map_with_path(check, params)


def check_updates(updates: Any, state_tree: Any) -> None:
    """Raises if ``updates`` has other leaves than the state was made for."""
    structures: list[Any] = [jax.tree.structure(tree) for tree in (updates, state_tree)]
    if structures[0] != structures[1]:
        given, expected = (
            {path_name(path) for path, _ in jax.tree.leaves_with_path(tree)}
            for tree in (updates, state_tree)
        )
        if given - expected:
            problem = f"have a leaf {min(given - expected)!r} that the state lacks"
        elif expected - given:
            problem = f"lack the leaf {min(expected - given)!r} that the state has"
        else:
            problem = (
                f"are a {structures[0]}, while the state was made for a {structures[1]}"
            )
        raise ValueError(f"the updates {problem}; was it made by init for this model?")
    check_inexact(updates)

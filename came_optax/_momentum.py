"""How the first moment is stored between steps."""

from typing import Any

import jax
import jax.numpy as jnp

from came_optax._checks import KeyPath, path_name
from came_optax._statistics import real_dtype

_DTYPES = ("float32", "bfloat16")


def check_dtype(mu_dtype: Any) -> None:
    """Raises unless momentum can be stored as ``mu_dtype``."""
    if mu_dtype not in _DTYPES:
        allowed = ", ".join(map(repr, _DTYPES))
        raise ValueError(f"mu_dtype must be one of {allowed}, got {mu_dtype!r}")


def init(p: Any, mu_dtype: str) -> jax.Array:
    """Returns zeros shaped (and, on an explicit mesh, sharded) like the parameter.

    Complex momentum has no 16-bit dtype and stays complex64 or complex128.
    """
    return jnp.zeros_like(p, dtype=_stored_dtype(p.dtype, mu_dtype))


def check(path: KeyPath, mu: jax.Array, like: jax.Array, mu_dtype: str) -> None:
    """Raises unless ``init`` makes such momentum for a leaf ``like`` the update."""
    dtype = _stored_dtype(like.dtype, mu_dtype)
    if mu.dtype != dtype:
        raise TypeError(
            f"mu of leaf {path_name(path)!r} has dtype {mu.dtype}; for {like.dtype} "
            f"updates and mu_dtype={mu_dtype!r} it must be {jnp.dtype(dtype)} (was the "
            "state made with another mu_dtype, or cast when saved or restored?)"
        )
    if mu.shape != like.shape:
        raise ValueError(
            f"mu of leaf {path_name(path)!r} has shape {mu.shape}, the updates have "
            f"shape {like.shape}"
        )


def load(mu: jax.Array, like: jax.Array) -> jax.Array:
    """Returns stored momentum in the dtype of the step's arithmetic."""
    return mu.astype(like.dtype)


def store(m: jax.Array, mu: jax.Array) -> jax.Array:
    """Returns momentum as it is stored in ``mu``."""
    return m.astype(mu.dtype)


def _stored_dtype(dtype: Any, mu_dtype: str) -> Any:
    """Returns what momentum of a leaf of ``dtype`` is stored as."""
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return jax.dtypes.canonicalize_dtype(dtype)
    return jnp.bfloat16 if mu_dtype == "bfloat16" else real_dtype(dtype)

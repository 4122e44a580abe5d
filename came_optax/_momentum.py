"""How the first moment is stored between steps."""

from typing import Any

import jax
import jax.numpy as jnp

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
    if jnp.issubdtype(p.dtype, jnp.complexfloating):
        return jnp.zeros_like(p)
    dtype = jnp.bfloat16 if mu_dtype == "bfloat16" else real_dtype(p.dtype)
    return jnp.zeros_like(p, dtype=dtype)


def load(mu: jax.Array, like: jax.Array) -> jax.Array:
    """Returns stored momentum in the dtype of the step's arithmetic."""
    return mu.astype(like.dtype)


def store(m: jax.Array, mu: jax.Array) -> jax.Array:
    """Returns momentum as it is stored in ``mu``."""
    return m.astype(mu.dtype)

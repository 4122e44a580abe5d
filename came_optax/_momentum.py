"""How the first moment is stored between steps."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from came_optax import _quantization as quantization
from came_optax._checks import KeyPath, Shape, path_name
from came_optax._factoring import FactoredAxes
from came_optax._residual import by_other_formulas
from came_optax._statistics import for_another_pass, init_statistic, real_dtype

_DTYPES = ("float32", "bfloat16", "int8", "int4")
_BITS = {"int8": 8, "int4": 4}

# Below this the momentum's share of all memory is small, and that of its scales large.
_MIN_QUANTIZED_SIZE = 4096


class Stored(NamedTuple):
    """One leaf's momentum as it is stored.

    Attributes:
      mu: the momentum, or its codes.
      mu_row: scales of the codes' rows; zeros of shape (1,) without codes.
      mu_col: scales of the codes' columns; zeros of shape (1,) without codes, or rows.
    """

    mu: jax.Array
    mu_row: jax.Array
    mu_col: jax.Array


def check_dtype(mu_dtype: Any) -> None:
    """Raises unless momentum can be stored as ``mu_dtype``."""
    if mu_dtype not in _DTYPES:
        allowed = ", ".join(map(repr, _DTYPES))
        raise ValueError(f"mu_dtype must be one of {allowed}, got {mu_dtype!r}")


def is_quantized(x: Any, mu_dtype: str) -> bool:
    """Returns whether a leaf's momentum is stored as codes."""
    is_complex = jnp.issubdtype(x.dtype, jnp.complexfloating)
    large = math.prod(x.shape) >= _MIN_QUANTIZED_SIZE
    return mu_dtype in _BITS and large and not is_complex


def init(p: Any, axes: FactoredAxes, mu_dtype: str) -> Stored:
    """Returns stored zeros; on an explicit mesh, sharded like the parameter.

    Complex momentum has no narrow dtype and stays complex64 or complex128.
    """
    mu = jnp.zeros_like(p, dtype=_stored_dtype(p, mu_dtype))
    reduced: tuple[tuple[int, ...] | None, ...] = (None, None)
    if is_quantized(p, mu_dtype):
        reduced = quantization.reductions(axes, p.ndim)
        if mu_dtype == "int4":
            packed = jax.eval_shape(quantization.pack, mu)
            mu = jnp.zeros(packed.shape, packed.dtype, device=packed.sharding)
    return Stored(mu, *(init_statistic(p, max_over) for max_over in reduced))


def check(
    path: KeyPath, stored: Stored, like: jax.Array, axes: FactoredAxes, mu_dtype: str
) -> None:
    """Raises unless ``init`` stores such momentum for a leaf ``like`` the update."""
    dtype = real_dtype(like.dtype)
    expected: list[tuple[Shape, Any]] = [
        (like.shape, _stored_dtype(like, mu_dtype)),
        ((1,), dtype),
        ((1,), dtype),
    ]
    if is_quantized(like, mu_dtype):
        if mu_dtype == "int4":
            expected[0] = (quantization.packed_shape(like.shape), jnp.uint8)
        for i, reduced in enumerate(quantization.reductions(axes, like.ndim), 1):
            if reduced is not None:
                kept = [n for axis, n in enumerate(like.shape) if axis not in reduced]
                expected[i] = (tuple(kept), dtype)
    for name, x, (shape, dtype) in zip(stored._fields, stored, expected, strict=True):
        if x.dtype != dtype:
            raise TypeError(
                f"{name} of leaf {path_name(path)!r} has dtype {x.dtype}; for "
                f"{like.dtype} updates and mu_dtype={mu_dtype!r} it must be "
                f"{jnp.dtype(dtype)} (was the state made with another mu_dtype, or "
                "cast when saved or restored?)"
            )
        if x.shape != shape:
            raise ValueError(
                f"{name} of leaf {path_name(path)!r} has shape {x.shape}; for updates "
                f"of shape {like.shape} it must be {shape}"
            )


def load(
    stored: Stored, like: jax.Array, axes: FactoredAxes, mu_dtype: str
) -> jax.Array:
    """Returns stored momentum in the dtype of the step's arithmetic."""
    if not is_quantized(like, mu_dtype):
        return stored.mu.astype(like.dtype)
    codes = stored.mu
    if mu_dtype == "int4":
        codes = quantization.unpack(codes, like)
    reduced = quantization.reductions(axes, like.ndim)
    scales = quantization.Scales(stored.mu_row, stored.mu_col, *reduced)
    return quantization.decode(codes, scales, _BITS[mu_dtype])


def store(
    m: jax.Array,
    old_m: jax.Array,
    u: jax.Array,
    decay: jax.Array,
    stored: Stored,
    axes: FactoredAxes,
    mu_dtype: str,
) -> Stored:
    """Returns ``m``, the average of ``old_m`` and ``u``, as ``stored`` was stored."""
    if not is_quantized(m, mu_dtype):
        return stored._replace(mu=m.astype(_stored_dtype(m, mu_dtype)))
    row_max, col_max = quantization.reductions(axes, m.ndim)
    recomputed = functools.partial(by_other_formulas, is_quantized=True)
    for_row, for_col = jax.lax.platform_dependent(
        m,
        old_m,
        u,
        decay,
        cuda=recomputed,
        tpu=recomputed,
        default=lambda m, *_: (m, m),
    )
    row, col = quantization.largest(for_another_pass(for_row), row_max), stored.mu_col
    if col_max is not None:
        for_col, _ = for_another_pass((for_col, row))  # Not the same barrier again.
        col = quantization.largest(for_col, col_max)
    scales = quantization.Scales(row, col, row_max, col_max)
    codes = quantization.encode(m, scales, _BITS[mu_dtype])
    if mu_dtype == "int4":
        codes = quantization.pack(codes)
    return Stored(codes, row, col)


def _stored_dtype(x: Any, mu_dtype: str) -> Any:
    """Returns the dtype of a leaf's stored momentum, before 4 bits are packed."""
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return jax.dtypes.canonicalize_dtype(x.dtype)
    if is_quantized(x, mu_dtype):
        return jnp.int8
    return jnp.bfloat16 if mu_dtype == "bfloat16" else real_dtype(x.dtype)

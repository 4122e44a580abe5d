"""Moving averages of squares, whole or factored into rows and columns.

All functions work on one leaf. ``x`` is already in the statistics' precision.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from came_optax._checks import KeyPath, Shape, path_name
from came_optax._factoring import FactoredAxes

_SMALL_ON_CHIP = 40 * 2**20  # Bytes. TPU cores have 64 MiB or more.


def real_dtype(dtype: Any) -> Any:
    """Returns the dtype of a leaf's statistics: float32, or float64 for 64 bits.

    Without ``jax_enable_x64``, NumPy's 64 bits are 32 to JAX.
    """
    wide = jnp.finfo(jax.dtypes.canonicalize_dtype(dtype)).bits == 64
    return jnp.float64 if wide else jnp.float32


def in_precision_of(statistic: jax.Array, x: jax.Array) -> jax.Array:
    """Returns ``x`` as precise as ``statistic``, and complex if it was."""
    if not jnp.iscomplexobj(x):
        return x.astype(statistic.dtype)
    return x.astype(jnp.complex128 if statistic.dtype == jnp.float64 else jnp.complex64)


def abs_sq(x: jax.Array) -> jax.Array:
    """Returns |x|², which is real for complex ``x`` too."""
    return jnp.real(x * jnp.conj(x))


def mean_square(
    x: jax.Array, axes: tuple[int, ...], eps: Any, factor: jax.typing.ArrayLike = 1.0
) -> jax.Array:
    """Returns the mean over ``axes`` of |factor · x|² + eps.

    It saturates where a sum of such means would overflow (for float32, gradients beyond
    1e16 or so), so that finite values never give an infinite statistic. Everything but
    the sum of squares is left to do on the means: that sum alone XLA computes without
    storing the squares.
    """
    square = abs_sq(x)
    factor, eps = (jnp.asarray(x, square.dtype) for x in (factor, eps))
    mean = factor**2 * jnp.mean(square, axes) + eps
    return jnp.minimum(mean, jnp.finfo(mean.dtype).max / (2 * max(mean.size, 1)))


def for_another_pass(xs: Any) -> Any:
    """Returns arrays for a mean or maximum that shares no work with their other uses.

    On CPUs XLA would store what such a reduction and something else have in common,
    which costs more than to compute it twice. Elsewhere a barrier would stop it from
    reducing rows and columns in one pass.
    """
    return jax.lax.platform_dependent(
        xs, cpu=jax.lax.optimization_barrier, default=lambda xs: xs
    )


def read_once(x: jax.Array, negative: jax.Array) -> jax.Array:
    """Returns ``x``; on TPUs a copy, for which the chip's own memory has room.

    XLA keeps there what is read again, but starts the first pass over ``x`` before its
    own copy has arrived. It makes this one because it cannot know that no statistic is
    ``negative``, a bool of shape (), and not before that is known.
    """

    def copied(x: jax.Array, negative: jax.Array) -> Any:
        return jax.lax.optimization_barrier(jnp.where(negative, 0, x))

    if x.nbytes > _SMALL_ON_CHIP:
        return x
    read: jax.Array = jax.lax.platform_dependent(
        x, negative, tpu=copied, default=lambda x, negative: x
    )
    return read


def in_turn(x: jax.Array, turn: jax.Array) -> jax.Array:
    """Returns ``x``, but on CPUs not before ``turn`` is known.

    There XLA would work on all leaves at once, and hold temporaries for each. It waits
    because it cannot know that no statistic is negative.
    """
    waiting: jax.Array = jax.lax.platform_dependent(
        x,
        turn,
        cpu=lambda x, turn: jnp.where(turn, jnp.nan, x),
        default=lambda x, turn: x,
    )
    return waiting


def turn_after(*statistics: jax.Array) -> jax.Array:
    """Returns False for :func:`in_turn`, known when the statistics are."""
    return functools.reduce(jnp.logical_or, (jnp.any(s < 0) for s in statistics))


def reductions(
    axes: FactoredAxes,
) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None, tuple[int, ...] | None]:
    """Returns the axes that the row, column and full statistics are means over.

    None stands for a statistic that the leaf doesn't have.
    """
    return (axes.col, axes.row, None) if axes.factored else (None, None, ())


def init_statistic(p: Any, mean_over: tuple[int, ...] | None) -> jax.Array:
    """Returns zeros of the statistic's shape and, on an explicit mesh, sharding."""
    dtype = real_dtype(p.dtype)
    if mean_over is None:
        return jnp.zeros((1,), dtype)
    kept = [axis for axis in range(p.ndim) if axis not in mean_over]
    shape = tuple(p.shape[axis] for axis in kept)
    # The type of the mean: jax.eval_shape would say so too, in a millisecond a leaf.
    sharding = jax.typeof(p).sharding
    spec = PartitionSpec(*(sharding.spec[axis] for axis in kept))
    return jnp.zeros(shape, dtype, device=NamedSharding(sharding.mesh, spec))


def check_statistic(
    name: str,
    path: KeyPath,
    statistic: jax.Array,
    shape: Shape,
    mean_over: tuple[int, ...] | None,
) -> None:
    """Raises unless ``init`` makes such a statistic for a leaf of ``shape``."""
    expected: Shape = (1,)
    if mean_over is not None:
        expected = tuple(n for axis, n in enumerate(shape) if axis not in mean_over)
    if statistic.shape != expected:
        raise ValueError(
            f"{name} of leaf {path_name(path)!r} has shape {statistic.shape}; for "
            f"updates of shape {shape} and this factoring it must be {expected}"
        )
    if statistic.dtype not in (jnp.float32, jnp.float64):
        raise TypeError(
            f"{name} of leaf {path_name(path)!r} has dtype {statistic.dtype}; allowed "
            "are float32 and float64 (was the state cast when saved or restored?)"
        )


def moving_average(average: jax.Array, x: jax.Array, decay: jax.Array) -> jax.Array:
    """Returns decay · average + (1 − decay) · x, for float32 ``decay``."""
    return decay.astype(x.dtype) * average + (1 - decay).astype(x.dtype) * x


def update_mean_square(
    statistic: jax.Array,
    x: jax.Array,
    mean_over: tuple[int, ...],
    decay: jax.Array,
    eps: jax.Array,
    factor: jax.typing.ArrayLike = 1.0,
) -> jax.Array:
    """Returns the moving average of the mean over some axes of |factor · x|² + eps."""
    return moving_average(statistic, mean_square(x, mean_over, eps, factor), decay)


def one_minus_power(decay: jax.Array, count: jax.typing.ArrayLike) -> jax.Array:
    """Returns 1 − decayᵗ, accurate where decayᵗ is nearly 1; float32."""
    return -jnp.expm1(jnp.asarray(count, jnp.float32) * jnp.log1p(decay - 1))


def mean_of_row(row: jax.Array, axes: FactoredAxes) -> jax.Array:
    """Returns the mean of a leaf's row statistic, which broadcasts with the leaf."""
    return jnp.mean(jnp.expand_dims(row, axes.col), axes.row, keepdims=True)


def divide_by_root(
    x: jax.Array, moments: tuple[jax.Array, ...], axes: FactoredAxes
) -> jax.Array:
    """Returns x / sqrt(row colᵀ / mean(row)), or x / sqrt(v) if not factored.

    One factor after the other: each is finite, where their product need not be (a row
    and a column that were zero until now).

    Args:
      x: the leaf.
      moments: its row and its column statistic, or its full second moment.
      axes: the leaf's axes.
    """
    if not axes.factored:
        (v,) = moments
        return x * jax.lax.rsqrt(v).astype(x.dtype)
    row, col = moments
    row_mean = mean_of_row(row, axes)
    row_factor = jnp.sqrt(row_mean) * jax.lax.rsqrt(jnp.expand_dims(row, axes.col))
    col = jnp.expand_dims(col, axes.row)
    return x * row_factor.astype(x.dtype) * jax.lax.rsqrt(col).astype(x.dtype)

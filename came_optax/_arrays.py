"""Arrays of the state, as ``init`` makes them from a parameter."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from came_optax._paths import KeyPath, Shape, path_name


def real_dtype(dtype: Any) -> Any:
    """Returns the dtype of a leaf's statistics: float32, or float64 for 64 bits.

    Without ``jax_enable_x64``, NumPy's 64 bits are 32 to JAX.
    """
    wide = jnp.finfo(jax.dtypes.canonicalize_dtype(dtype)).bits == 64
    return jnp.float64 if wide else jnp.float32


def wide_dtype(dtype: Any) -> Any:
    """Returns the dtype of a leaf's arithmetic: its statistics', or complex."""
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return jax.dtypes.canonicalize_dtype(dtype)
    return real_dtype(dtype)


def kept_shape(shape: Shape, reduced: tuple[int, ...] | None) -> Shape:
    """Returns a shape without some axes; (1,) for an array that a leaf lacks."""
    if reduced is None:
        return (1,)
    return tuple(n for axis, n in enumerate(shape) if axis not in reduced)


def zeros(p: Any, reduced: tuple[int, ...] | None = ()) -> jax.Array:
    """Returns zeros typed like a real reduction of ``p``, on explicit meshes too.

    Args:
      p: the parameter.
      reduced: the axes that are reduced; None for an array that the leaf lacks, which
        zeros of shape (1,) stand for, of its own so that it can be donated.
    """
    shape, dtype = kept_shape(p.shape, reduced), real_dtype(p.dtype)
    if reduced is None:
        return jnp.zeros(shape, dtype)
    # The type of the mean: jax.eval_shape would say so too, in a millisecond a leaf.
    sharding: Any = jax.typeof(p).sharding
    is_concrete = isinstance(p, jax.Array) and not isinstance(p, jax.core.Tracer)
    if is_concrete and isinstance(p.sharding, NamedSharding):
        sharding = p.sharding
    names = [*sharding.spec, *[None] * (len(p.shape) - len(sharding.spec))]
    spec = PartitionSpec(*(x for axis, x in enumerate(names) if axis not in reduced))
    place = NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind)
    return jnp.zeros(shape, dtype, device=place)


def check_array(
    name: str, path: KeyPath, x: Any, shape: Shape, dtype: Any, like: Any, why: str
) -> None:
    """Raises unless an array of the state is as ``init`` makes it for a leaf.

    Args:
      name: the field of the state.
      path: the leaf's.
      x: the array.
      shape: what it must have.
      dtype: what it must have, or several of them.
      like: the leaf of the updates.
      why: what else it depends on.
    """
    allowed = dtype if isinstance(dtype, tuple) else (dtype,)
    if x.dtype not in allowed:
        names = " or ".join(str(jnp.dtype(d)) for d in allowed)
        raise TypeError(
            f"{name} of leaf {path_name(path)!r} has dtype {x.dtype}; for {like.dtype} "
            f"updates and {why} it must be {names} (was it cast when saved or "
            "restored? a state made with other options is taken over by convert_state)"
        )
    if x.shape != shape:
        hint = RESIZED
        if has_axes_of(x.shape, like.shape):
            hint = "a state made with other options is taken over by convert_state"
        raise ValueError(
            f"{name} of leaf {path_name(path)!r} has shape {x.shape}; for updates of "
            f"shape {like.shape} and {why} it must be {shape} ({hint})"
        )


RESIZED = (
    "the parameter was resized, and its state must be resized with it, as Moving a "
    "running job in the documentation shows, or be a new one that init makes"
)


def has_axes_of(shape: Shape, whole: Shape) -> bool:
    """Returns whether ``shape`` may be that of a state's array for such a parameter."""
    axes = iter(whole)
    return shape == (1,) or all(n in axes for n in shape)

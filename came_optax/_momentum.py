"""How the first moment is stored between steps: as an array, or as codes."""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from came_optax import _codes, _packing
from came_optax._arrays import check_array, kept_shape, real_dtype, wide_dtype, zeros
from came_optax._checks import as_dtype, call_hint
from came_optax._codes import Codes
from came_optax._factored_axes import FactoredAxes
from came_optax._paths import KeyPath, path_name

MuDtype: TypeAlias = (
    Literal["float32", "bfloat16", "int8", "int4"] | jax.typing.DTypeLike | None
)
Stored: TypeAlias = jax.Array | Codes
# An array for whoever calls it: the same one, or the same computed anew.
Lazy: TypeAlias = Callable[[], jax.Array]


def is_codes(x: Any) -> bool:
    """Returns whether a leaf of ``mu`` is stored as codes."""
    return isinstance(x, Codes)


_DTYPES = ("float32", "bfloat16", "int8", "int4")
_BITS = {"int8": 8, "int4": 4}

# Below this the momentum's share of all memory is small, and that of its scales large.
_MIN_CODED_SIZE = 4096


def dtype_name(mu_dtype: Any) -> str:
    """Returns the name of a dtype that momentum can be stored as; None is float32.

    Raises:
      ValueError: it can't.
    """
    dtype = None if mu_dtype is None else as_dtype(mu_dtype)
    name = "float32" if mu_dtype is None else dtype and dtype.name
    if name not in _DTYPES:
        allowed = ", ".join(map(repr, _DTYPES))
        raise ValueError(
            f"mu_dtype must be one of {allowed} or None, got {mu_dtype!r}"
            f"{call_hint(mu_dtype)}"
        )
    return name


def init(p: Any, axes: FactoredAxes, mu_dtype: str) -> Stored:
    """Returns stored zeros; on an explicit mesh, sharded like the parameter.

    Codes, with their scales, are stored where they take less than the array would, and
    the leaf isn't small. Complex momentum stays complex64 or complex128.
    """
    if not has_codes(p, axes, mu_dtype):
        return jnp.zeros_like(p, dtype=_array_dtype(p, mu_dtype))
    values = jnp.zeros_like(p, dtype=jnp.int8)
    if mu_dtype == "int4":
        packed = jax.eval_shape(_packing.pack, values)
        values = jnp.zeros(packed.shape, packed.dtype, device=packed.sharding)
    over_col, over_row = _codes.reductions(axes, p.ndim)
    return Codes(values, zeros(p, over_col), zeros(p, over_row))


def check(
    path: KeyPath, stored: Any, like: Any, axes: FactoredAxes, mu_dtype: str
) -> None:
    """Raises unless ``init`` stores such momentum for a leaf ``like`` the update."""
    why = f"mu_dtype={mu_dtype!r}"
    if not has_codes(like, axes, mu_dtype):
        if isinstance(stored, Codes):
            raise TypeError(
                f"mu of leaf {path_name(path)!r} is codes; for {like.dtype} updates of "
                f"shape {like.shape} and {why} it must be an array (a state made with "
                "another mu_dtype is taken over by convert_state)"
            )
        dtype = _array_dtype(like, mu_dtype)
        check_array("mu", path, stored, like.shape, dtype, like, why)
        return
    if not isinstance(stored, Codes):
        raise TypeError(
            f"mu of leaf {path_name(path)!r} has dtype {stored.dtype}; for updates of "
            f"shape {like.shape} and {why} it must be Codes(values, row_scale, "
            "col_scale) (a state made with another mu_dtype is taken over by "
            "convert_state)"
        )
    shape, dtype = like.shape, jnp.int8
    if mu_dtype == "int4":
        shape, dtype = _packing.packed_shape(shape), jnp.uint8
    check_array("mu.values", path, stored.values, shape, dtype, like, why)
    for name, reduced in zip(
        ("row_scale", "col_scale"), _codes.reductions(axes, like.ndim), strict=True
    ):
        shape, dtype = kept_shape(like.shape, reduced), real_dtype(like.dtype)
        scale = getattr(stored, name)
        check_array(f"mu.{name}", path, scale, shape, dtype, like, why)


def has_codes(p: Any, axes: FactoredAxes, mu_dtype: str) -> bool:
    """Returns whether a leaf's momentum is stored as codes."""
    size = math.prod(p.shape)
    is_complex = jnp.issubdtype(p.dtype, jnp.complexfloating)
    if mu_dtype not in _BITS or is_complex or size < _MIN_CODED_SIZE:
        return False
    scales = sum(
        math.prod(kept_shape(p.shape, reduced))
        for reduced in _codes.reductions(axes, len(p.shape))
    )
    values = p.shape if mu_dtype == "int8" else _packing.packed_shape(p.shape)
    itemsize: int = jnp.dtype(real_dtype(p.dtype)).itemsize
    return bool(math.prod(values) + itemsize * scales < itemsize * size)


class Storage(NamedTuple):
    """How one leaf's momentum is stored after a step.

    Attributes:
      like: the leaf, in the dtype of the step's arithmetic.
      axes: the leaf's axes.
      step: number of updates with this one; shape (), int32.
    """

    like: jax.Array
    axes: FactoredAxes
    step: jax.Array

    def in_place(self, stored: Stored) -> bool:
        """Returns whether momentum is stored as it is computed."""
        return not isinstance(stored, Codes) and stored.dtype == self.like.dtype

    def load(self, stored: Stored) -> jax.Array:
        """Returns stored momentum in the dtype of the step's arithmetic."""
        if isinstance(stored, Codes):
            return _codes.decode(stored, self.like, self.axes)
        return stored.astype(self.like.dtype)

    def store(
        self, new: Lazy, old: Stored, largest: Any = _codes.largest
    ) -> tuple[Stored, Lazy]:
        """Returns momentum stored as the old one was, and what the step goes on with.

        That is the momentum itself, wherever what is stored is rounded.
        """
        if isinstance(old, Codes):
            return _codes.encode(new, self.axes, old.bits, self.step, largest), new
        momentum = new()
        if not self.in_place(old):
            return momentum.astype(old.dtype), new
        return momentum, lambda: momentum


def _array_dtype(p: Any, mu_dtype: str) -> Any:
    """Returns the dtype of momentum that isn't stored as codes."""
    is_complex = jnp.issubdtype(p.dtype, jnp.complexfloating)
    return (
        jnp.bfloat16
        if mu_dtype == "bfloat16" and not is_complex
        else wide_dtype(p.dtype)
    )

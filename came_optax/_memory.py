"""What an optimizer's state takes, before any of it is allocated."""

import collections
import dataclasses
from collections.abc import Container, Mapping, Sequence
from typing import Any

import jax
import optax

from came_optax._checks import KeyPath, path_name

_OTHER = "(other)"  # Counters, hyperparameters and such, which belong to no parameter.


@dataclasses.dataclass(frozen=True)
class StateMemory:
    """Bytes of an optimizer's state, as :func:`state_memory` counts them.

    ``str`` and ``print`` show it as a table. Mappings are sorted by size, largest
    first; what belongs to no parameter, such as counters, is named ``"(other)"``.

    Attributes:
      total: bytes of all arrays of the state.
      num_params: numbers in the parameters.
      adamw: bytes of ``optax.adamw``'s state for the same parameters, which has their
        dtypes.
      by_dtype: bytes for each dtype.
      by_module: bytes for each top-level key of the parameters, below those that all
        share.
      by_leaf: bytes for each parameter, named as ``"decoder/kernel"``.
      params_by_module: numbers in the parameters of each top-level key.
    """

    total: int
    num_params: int
    adamw: int
    by_dtype: Mapping[str, int]
    by_module: Mapping[str, int]
    by_leaf: Mapping[str, int]
    params_by_module: Mapping[str, int]

    @property
    def bytes_per_param(self) -> float:
        """Bytes of state for each number in the parameters."""
        return self.total / max(self.num_params, 1)

    def __str__(self) -> str:
        """Returns a table of modules and dtypes, and AdamW's state beside it."""
        rows = [("", "parameters", "state bytes", "bytes/param")]
        for name, size in self.by_module.items():
            rows.append(_row(name, self.params_by_module.get(name, 0), size))
        rows.append(_row("total", self.num_params, self.total))
        rows += [_row(f"  {name}", 0, size) for name, size in self.by_dtype.items()]
        rows.append(_row("AdamW", self.num_params, self.adamw))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = (
            f"{row[0]:<{widths[0]}}"
            + "".join(f"  {x:>{n}}" for x, n in zip(row[1:], widths[1:], strict=True))
            for row in rows
        )
        return "\n".join(map(str.rstrip, lines))


def state_memory(tx: optax.GradientTransformation, params: Any) -> StateMemory:
    """Counts the bytes of ``tx.init(params)`` without allocating any.

    Works for every Optax transformation, however chained and wrapped, and for
    parameters that are shapes only. A state array belongs to the parameter whose path
    its own path ends with. It traces ``tx.init``, a tenth of a millisecond or so for
    each array of the state, whatever its size: milliseconds for stacked layers.

    Args:
      tx: the optimizer.
      params: the parameters, as arrays or as ``jax.ShapeDtypeStruct``.

    Returns:
      The bytes, in total and by dtype, top-level module and leaf.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from came_optax import came, state_memory
      >>> kernel = jax.ShapeDtypeStruct((4096, 16384), jnp.bfloat16)
      >>> print(state_memory(came(1e-3, mu_dtype="int8"), {"up": {"kernel": kernel}}))
                 parameters  state bytes  bytes/param
      up         67,108,864   67,354,628        1.004
      (other)                          8
      total      67,108,864   67,354,636        1.004
        int8                  67,108,864
        float32                  245,764
        int32                          8
      AdamW      67,108,864  268,435,460        4.000
    """
    state = jax.eval_shape(tx.init, params)
    leaves = dict(jax.tree.leaves_with_path(params))
    depth = 1 + _shared_keys(list(leaves))
    names: dict[KeyPath | None, tuple[str, str]] = {None: (_OTHER, _OTHER)}
    params_by_module: collections.Counter[str] = collections.Counter()
    for path, p in leaves.items():
        names[path] = path_name(path), path_name(path[:depth])
        params_by_module[names[path][1]] += p.size
    by_leaf: collections.Counter[str] = collections.Counter()
    by_module: collections.Counter[str] = collections.Counter()
    by_dtype: collections.Counter[str] = collections.Counter()
    for path, x in jax.tree.leaves_with_path(state):
        leaf, module = names[_owner(path, leaves)]
        by_leaf[leaf] += _bytes(x)
        by_module[module] += _bytes(x)
        by_dtype[str(x.dtype)] += _bytes(x)
    return StateMemory(
        total=by_dtype.total(),
        num_params=params_by_module.total(),
        # Two moments in the parameters' dtypes, and an int32 counter.
        adamw=2 * sum(map(_bytes, leaves.values())) + 4,
        by_dtype=dict(by_dtype.most_common()),
        by_module=dict(by_module.most_common()),
        by_leaf=dict(by_leaf.most_common()),
        params_by_module=dict(params_by_module.most_common()),
    )


def _bytes(x: Any) -> int:
    return int(x.size) * int(x.dtype.itemsize)


def _owner(path: KeyPath, params: Container[KeyPath]) -> KeyPath | None:
    """Returns the longest end of a state array's path that is a parameter's path."""
    ends = (path[i:] for i in range(len(path) + 1))
    return next((end for end in ends if end in params), None)


def _shared_keys(paths: Sequence[KeyPath]) -> int:
    """Returns how many leading keys all paths share, such as Linen's ``"params"``."""
    for i, keys in enumerate(zip(*paths, strict=False)):
        if len(set(keys)) > 1:
            return i
    return 0


def _row(name: str, num_params: int, size: int) -> tuple[str, str, str, str]:
    if not num_params:
        return name, "", f"{size:,}", ""
    return name, f"{num_params:,}", f"{size:,}", f"{size / num_params:.3f}"

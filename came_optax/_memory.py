"""What an optimizer's state takes, before any of it is allocated."""

import collections
import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import optax

from came_optax._boxes import unbox
from came_optax._paths import KeyPath, Shape, owner, path_name

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
        dtypes. It is that alone: what wraps the optimizer, such as the gradients that
        ``optax.MultiSteps`` adds up, would come on top of it too.
      by_dtype: bytes for each dtype.
      by_module: bytes for each top-level key of the parameters, below those that all
        share.
      by_leaf: bytes for each parameter, named as ``"decoder/kernel"``.
      params_by_module: numbers in the parameters of each top-level key.
      shapes: each parameter's shape.
      rows: the shape of the row statistic of each parameter that has one.
      cols: the shape of the column statistic of each parameter that has one.
      groups: the label of each parameter that ``optax.partition`` gave one, such as
        ``"hidden"`` and ``"rest"`` in :func:`came_muon`.
    """

    total: int
    num_params: int
    adamw: int
    by_dtype: Mapping[str, int]
    by_module: Mapping[str, int]
    by_leaf: Mapping[str, int]
    params_by_module: Mapping[str, int]
    shapes: Mapping[str, Shape]
    rows: Mapping[str, Shape]
    cols: Mapping[str, Shape]
    groups: Mapping[str, str]

    @property
    def bytes_per_param(self) -> float:
        """Bytes of state for each number in the parameters."""
        return self.total / max(self.num_params, 1)

    def __str__(self) -> str:
        """Returns a table of modules and dtypes, and AdamW's state."""
        rows = [("", "parameters", "state bytes", "bytes/param")]
        for name, size in self.by_module.items():
            rows.append((name, *_counts(self.params_by_module.get(name, 0), size)))
        rows.append(("total", *_counts(self.num_params, self.total)))
        for name, size in self.by_dtype.items():
            rows.append((f"  {name}", *_counts(0, size)))
        rows.append(("AdamW alone", *_counts(self.num_params, self.adamw)))
        return "\n".join(_aligned(rows))

    def by_leaf_table(self) -> str:
        """Returns a table of leaves, with the shapes of their statistics.

        It shows what a factoring rule made of each leaf: the matrix ``(d | heads *
        head_dim)``, for one, has rows ``d`` and columns ``heads×head_dim``. An axis in
        both is one of a batch of matrices. Leaves without rows aren't factored. Where
        ``optax.partition`` is used, as in :func:`came_muon`, leaves have a group.

        Example:
          >>> import jax, jax.numpy as jnp
          >>> from came_optax import BalancedSplit, came, state_memory
          >>> kernels = {
          ...     "query": jax.ShapeDtypeStruct((768, 12, 64), jnp.float32),
          ...     "q_einsum": jax.ShapeDtypeStruct((12, 768, 64), jnp.float32),
          ... }
          >>> tx = came(1e-3, mu_dtype="int8", factoring=BalancedSplit())
          >>> print(state_memory(tx, kernels).by_leaf_table())
                        shape    rows  columns  parameters  state bytes  bytes/param
          q_einsum  12×768×64  12×768       64     589,824      701,188        1.189
          query     768×12×64     768    12×64     589,824      608,260        1.031
          (other)                                                     4
          total                                  1,179,648    1,309,452        1.110
        """
        head = "shape", "rows", "columns", "parameters", "state bytes", "bytes/param"
        rows: list[tuple[str, ...]] = [("", "group", *head)]
        for name, size in self.by_leaf.items():
            shapes = (x.get(name) for x in (self.shapes, self.rows, self.cols))
            number = math.prod(self.shapes[name]) if name in self.shapes else 0
            group = self.groups.get(name, "")
            rows.append((name, group, *map(_times, shapes), *_counts(number, size)))
        total = _counts(self.num_params, self.total)
        rows.append(("total", "", "", "", "", *total))
        if not self.groups:
            rows = [(name, *numbers) for name, _, *numbers in rows]
        return "\n".join(_aligned(rows))


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
      up           67,108,864   67,354,628        1.004
      (other)                            4
      total        67,108,864   67,354,632        1.004
        int8                    67,108,864
        float32                    245,764
        int32                            4
      AdamW alone  67,108,864  268,435,460        4.000
    """
    leaves = dict(jax.tree.leaves_with_path(unbox(params)))
    depth = 1 + _shared_keys(list(leaves))
    names: dict[KeyPath | None, tuple[str, str]] = {None: (_OTHER, _OTHER)}
    params_by_module: collections.Counter[str] = collections.Counter()
    for path, p in leaves.items():
        names[path] = path_name(path), path_name(path[:depth])
        params_by_module[names[path][1]] += p.size
    by_leaf: collections.Counter[str] = collections.Counter()
    by_module: collections.Counter[str] = collections.Counter()
    by_dtype: collections.Counter[str] = collections.Counter()
    of_field: dict[str, dict[str, Shape]] = collections.defaultdict(dict)
    groups: dict[str, str] = {}
    # Without boxes, leaves are called as factoring rules see them.
    state = unbox(jax.eval_shape(tx.init, params))
    for path, x in jax.tree.leaves_with_path(state):
        param, field = owner(path, leaves)
        leaf, module = names[param]
        by_leaf[leaf] += _bytes(x)
        by_module[module] += _bytes(x)
        by_dtype[str(x.dtype)] += _bytes(x)
        of_field[field].setdefault(leaf, x.shape)
        for key, label in itertools.pairwise(path if param is not None else ()):
            if isinstance(key, jax.tree_util.GetAttrKey) and key.name == "inner_states":
                groups[leaf] = path_name((label,))
    rows, cols = (
        {**of_field[f"s_{side}"], **of_field[f"v_{side}"]} for side in ("row", "col")
    )
    # What isn't factored has placeholders.
    factored = [leaf for leaf in rows if (rows[leaf], cols[leaf]) != ((1,), (1,))]
    return StateMemory(
        total=by_dtype.total(),
        num_params=params_by_module.total(),
        # Two moments in the parameters' dtypes, and an int32 counter.
        adamw=2 * sum(map(_bytes, leaves.values())) + 4,
        by_dtype=dict(by_dtype.most_common()),
        by_module=dict(by_module.most_common()),
        by_leaf=dict(by_leaf.most_common()),
        params_by_module=dict(params_by_module.most_common()),
        shapes={names[path][0]: p.shape for path, p in leaves.items()},
        rows={leaf: rows[leaf] for leaf in factored},
        cols={leaf: cols[leaf] for leaf in factored},
        groups=groups,
    )


def _bytes(x: Any) -> int:
    return int(x.size) * int(x.dtype.itemsize)


def _shared_keys(paths: Sequence[KeyPath]) -> int:
    """Returns how many leading keys all paths share, such as Linen's ``"params"``."""
    for i, keys in enumerate(zip(*paths, strict=False)):
        if len(set(keys)) > 1:
            return i
    return 0


def _times(shape: Shape | None) -> str:
    return "×".join(map(str, shape or ()))


def _counts(num_params: int, size: int) -> tuple[str, str, str]:
    if not num_params:
        return "", f"{size:,}", ""
    return f"{num_params:,}", f"{size:,}", f"{size / num_params:.3f}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns lines with the first column on the left, the others on the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            [f"{row[0]:<{widths[0]}}"]
            + [f"{x:>{n}}" for x, n in zip(row[1:], widths[1:], strict=True)]
        ).rstrip()
        for row in rows
    ]

"""Shardings as callers give them, and the mesh axes in them."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

from jax.sharding import NamedSharding, PartitionSpec

from came_optax._paths import KeyPath, path_name

Names: TypeAlias = tuple[str, ...]  # Of mesh axes.


def mesh_axes(entry: Any) -> Names:
    """Returns the mesh axes in an entry of a PartitionSpec."""
    return entry if isinstance(entry, tuple) else () if entry is None else (entry,)


def devices(mesh: Any, entry: Any) -> int:
    """Returns among how many devices such an entry divides an axis."""
    return math.prod(mesh.shape[name] for name in mesh_axes(entry))


def trimmed(entries: Iterable[Any]) -> PartitionSpec:
    """Returns a spec without trailing None, as users write it."""
    kept = list(entries)
    while kept and kept[-1] is None:
        kept.pop()
    return PartitionSpec(*kept)


def is_sharding(x: Any) -> bool:
    return isinstance(x, NamedSharding | PartitionSpec)


def checked_meshes(shardings: Sequence[Any]) -> set[Any]:
    """Returns the mesh of shardings, or nothing if they are specs.

    Raises:
      TypeError: there are both kinds.
      ValueError: they are on several meshes.
    """
    if len(set(map(type, shardings))) > 1:
        raise TypeError("params_sharding mixes NamedSharding and PartitionSpec leaves")
    meshes = {s.mesh for s in shardings if hasattr(s, "mesh")}
    if len(meshes) > 1:
        raise ValueError(f"params_sharding names {len(meshes)} meshes, allowed is one")
    return meshes


def check_sharding(path: KeyPath, p: Any, sharding: Any) -> None:
    """Raises unless ``sharding`` is of a kind, and a rank, that fits a parameter."""
    if not is_sharding(sharding):
        raise TypeError(
            f"params_sharding at {path_name(path)!r} is {sharding!r}; allowed are "
            "NamedSharding and PartitionSpec"
        )
    spec = getattr(sharding, "spec", sharding)
    if len(spec) > len(p.shape):
        raise ValueError(
            f"params_sharding at {path_name(path)!r} is {spec}, for a parameter of "
            f"shape {p.shape}"
        )

"""Where leaves are on a mesh, as their types tell, or who calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from came_optax._boxes import unbox
from came_optax._paths import KeyPath, path_name
from came_optax._specs import check_sharding, checked_meshes, is_sharding


def by_path(params_sharding: Any) -> Mapping[KeyPath, Any]:
    """Returns shardings by the paths of leaves, or of subtrees, that they are of."""
    tree = unbox(params_sharding)
    return dict(jax.tree.leaves_with_path(tree, is_leaf=is_sharding))


def check_shardings(shardings: Mapping[KeyPath, Any], params: Any) -> None:
    """Raises unless each parameter has a sharding that fits it, all on one mesh."""
    found = []
    for path, p in jax.tree.leaves_with_path(params):
        found.append(_sharding_of(path, shardings))
        check_sharding(path, p, found[-1])
    checked_meshes(found)


def on_auto_axes(x: Any) -> bool:
    """Returns whether a parameter is on devices of which its type doesn't tell."""
    mesh: Any = jax.sharding.get_abstract_mesh()
    if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer):
        mesh = getattr(x.sharding, "mesh", mesh)
    kinds = zip(mesh.shape.values(), mesh.axis_types, strict=True)
    return any(size > 1 and kind == AxisType.Auto for size, kind in kinds)


def placement(
    paths: Sequence[KeyPath],
    leaves: Sequence[jax.Array],
    shardings: Mapping[KeyPath, Any],
) -> tuple[Any, list[PartitionSpec]]:
    """Returns the mesh to share work on, or None, and the leaves' specs.

    On Explicit axes the leaves' types tell; on Auto ones nothing does within jit.
    """
    mesh: Any = jax.sharding.get_abstract_mesh()
    types: list[Any] = [jax.typeof(x).sharding for x in leaves]
    if mesh.empty:
        mesh = next((t.mesh for t in types if not t.mesh.empty), mesh)
    if mesh.explicit_axes:
        return mesh, [t.spec for t in types]
    if not shardings:
        return None, []
    found = [_sharding_of(path, shardings) for path in paths]
    meshes = [s.mesh for s in found if isinstance(s, NamedSharding)]
    if mesh.empty and not meshes:
        raise ValueError(
            "params_sharding of PartitionSpecs needs a mesh: enter one with "
            "jax.set_mesh(mesh), or give NamedShardings"
        )
    mesh = meshes[0] if mesh.empty else mesh
    if mesh.size == 1 or AxisType.Manual in mesh.axis_types:  # In shard_map.
        return None, []
    return mesh, [getattr(s, "spec", s) for s in found]


def _sharding_of(path: KeyPath, shardings: Mapping[KeyPath, Any]) -> Any:
    prefixes = (path[:i] for i in range(len(path), -1, -1))
    sharding = next((shardings[p] for p in prefixes if p in shardings), None)
    if sharding is None:
        raise ValueError(f"params_sharding has nothing for leaf {path_name(path)!r}")
    return sharding

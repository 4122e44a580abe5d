"""Where an optimizer's state lives on a mesh."""

from typing import Any

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec

from came_optax._boxes import unbox
from came_optax._checks import broadcast
from came_optax._kept_axes import trace_init
from came_optax._paths import KeyPath, owner
from came_optax._specs import (
    check_sharding,
    checked_meshes,
    is_sharding,
    mesh_axes,
    trimmed,
)


def state_sharding(
    tx: optax.GradientTransformation, params: Any, params_sharding: Any
) -> Any:
    """Returns shardings for ``tx.init(params)`` that follow the parameters'.

    First moments and other arrays shaped like a parameter get its sharding, factored
    statistics the parameter's spec without the axes that they are means over, counters
    and placeholders are replicated. Works for any transformation whose ``init`` derives
    its arrays from the parameters (``jnp.zeros_like``, means, and so on), however
    wrapped: ``optax.chain``, ``masked``, ``partition``, ``MultiSteps``,
    ``inject_hyperparams``. What ``init`` makes from a bare shape is replicated. Arrays
    of a parameter that is in another kind of memory, such as ``"pinned_host"``, are
    there too.

    For meshes with ``Auto`` axes; on ``Explicit`` axes, ``jax.make_mesh``'s default in
    newer releases of JAX, the state follows its parameters by itself. Inside
    ``jax.shard_map`` means would be local to a shard: update under ``jax.jit``.

    Args:
      tx: the optimizer.
      params: the parameters, as arrays or as ``jax.ShapeDtypeStruct``.
      params_sharding: a ``NamedSharding`` or a ``PartitionSpec`` for each parameter;
        one may stand for a whole subtree, as in ``jax.jit``'s ``in_shardings``. None is
        no sharding: ``PartitionSpec()`` is that of what is replicated.

    Returns:
      A tree structured like ``tx.init(params)`` of the same kind of shardings. A
      ``NamedSharding`` leaves out mesh axes that do not divide a dimension, which
      ``jax.jit`` would not accept.

    Raises:
      TypeError: a leaf of ``params_sharding`` is of another kind, or they are mixed.
      ValueError: a spec has more entries than its parameter dimensions, shardings are
        on several meshes, or ``params_sharding`` does not fit ``params``.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from jax.sharding import PartitionSpec as P
      >>> from came_optax import came, state_sharding
      >>> params = {"kernel": jax.ShapeDtypeStruct((512, 2048), jnp.float32)}
      >>> specs = state_sharding(came(1e-3), params, {"kernel": P("fsdp", "tensor")})
      >>> optax.tree.get(specs, "mu")["kernel"] == P("fsdp", "tensor")
      True
      >>> optax.tree.get(specs, "v_col")["kernel"] == P("tensor")
      True

      With a mesh, the state is created where it belongs::

          shardings = state_sharding(tx, params, params_sharding)
          state = jax.jit(tx.init, out_shardings=shardings)(params)
    """
    shardings = broadcast("params_sharding", params_sharding, params, is_sharding)
    jax.tree.map_with_path(check_sharding, unbox(params), unbox(shardings))
    meshes = checked_meshes(jax.tree.leaves(shardings))
    specs = jax.tree.map(lambda s: getattr(s, "spec", s), shardings)
    state, state_specs = trace_init(tx.init, params, specs)
    if not meshes:
        return state_specs
    mesh = meshes.pop()
    kinds_of_memory = {
        path: sharding.memory_kind
        for path, sharding in zip(
            dict(jax.tree.leaves_with_path(params)),
            jax.tree.leaves(shardings),
            strict=True,
        )
    }

    def place(path: KeyPath, x: Any, spec: PartitionSpec) -> NamedSharding:
        of, _ = owner(path, kinds_of_memory)
        kind = None if of is None else kinds_of_memory[of]
        return NamedSharding(
            mesh, _dividing(spec, x.shape, mesh.shape), memory_kind=kind
        )

    return jax.tree.map_with_path(place, state, state_specs)


def _dividing(spec: PartitionSpec, shape: Any, sizes: Any) -> PartitionSpec:
    """Returns the spec without the mesh axes that don't divide their dimension."""

    def keep(entry: Any, size: int) -> Any:
        names, kept = mesh_axes(entry), []
        for name in names:
            if size % sizes[name]:
                break
            size //= sizes[name]
            kept.append(name)
        if len(kept) == len(names):
            return entry
        return tuple(kept) or None

    return trimmed(map(keep, spec, shape))

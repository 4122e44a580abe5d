"""Which axes of its parameter each array of a state has.

On ``Explicit`` mesh axes JAX keeps track of shardings in the types of arrays, through
means, transposes and all else that an ``init`` may do. So a parameter's axes are given
names as if they were mesh axes, and the state's arrays are asked for theirs.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from came_optax._specs import mesh_axes, trimmed


def kept_axes(init: Callable[[Any], Any], params: Any) -> tuple[Any, Any]:
    """Returns the shapes of ``init(params)``, and the axes that each array has.

    They are the numbers of the parameter's axes as text, ``PartitionSpec("0", "2")``,
    which is a leaf of a tree; trailing axes of no parameter are left out.
    """
    numbers = jax.tree.map(lambda p: PartitionSpec(*map(str, range(p.ndim))), params)
    return trace_init(init, params, numbers)


def lost_axes(ndim: int, kept: Any) -> tuple[int, ...]:
    """Returns which axes of a parameter an array of its state is a mean over."""
    return tuple(axis for axis in range(ndim) if str(axis) not in kept)


def trace_init(init: Callable[[Any], Any], params: Any, specs: Any) -> tuple[Any, Any]:
    """Returns the shapes of ``init(params)``, and specs that follow those given.

    It traces ``init`` with all axes explicit, whatever the mesh is, and of size 1, so
    that every dimension can be divided.
    """
    names = {
        name: None  # A dict, to keep the order.
        for spec in jax.tree.leaves(specs)
        for entry in spec
        for name in mesh_axes(entry)
    }
    mesh = AbstractMesh(
        (1,) * len(names), tuple(names), axis_types=(AxisType.Explicit,) * len(names)
    )

    def with_spec(p: Any, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, spec) if names else None
        return jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=sharding)

    # A context mesh cannot be replaced by one of another size, but by none.
    no_mesh = AbstractMesh((), ())
    with jax.sharding.use_abstract_mesh(no_mesh), jax.sharding.use_abstract_mesh(mesh):
        state = jax.eval_shape(init, jax.tree.map(with_spec, params, specs))
    return state, jax.tree.map(_spec_of, state)


def _spec_of(x: jax.ShapeDtypeStruct) -> PartitionSpec:
    """Returns the spec in an array's type."""
    return PartitionSpec() if x.sharding is None else trimmed(x.sharding.spec)

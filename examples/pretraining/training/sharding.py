"""Which mesh axes each parameter, and with it the optimizer's state, is split over."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def param_shardings(
    mesh: Mesh, params: nnx.State, tensor_axes: Mapping[str, int]
) -> Any:
    """Returns a sharding for each parameter.

    The axis that the model names is split over "tensor", and the largest of the others
    of a matrix over "fsdp", where they can be divided evenly. Vectors are small.

    Args:
        mesh: The mesh.
        params: The model's `nnx.Param` state, or its shapes.
        tensor_axes: Axes by regular expressions of paths like "h/0/mlp/c_fc/kernel".
    """

    def spec(path: str, shape: tuple[int, ...]) -> PartitionSpec:
        entries: list[str | None] = [None] * len(shape)

        def divides(name: str, axis: int) -> bool:
            size = mesh.shape[name]
            return size > 1 and entries[axis] is None and shape[axis] % size == 0

        for pattern, axis in tensor_axes.items():
            if re.search(pattern, path) and divides("tensor", axis):
                entries[axis] = "tensor"
        axes = [axis for axis in range(len(shape)) if divides("fsdp", axis)]
        if axes and len(shape) > 1:
            entries[max(axes, key=lambda axis: shape[axis])] = "fsdp"
        return PartitionSpec(*entries)

    return nnx.from_flat_state(
        (path, p.replace(NamedSharding(mesh, spec("/".join(map(str, path)), p.shape))))
        for path, p in nnx.to_flat_state(params)
    )


def make_gather(shardings: Any) -> Callable[[Any], Any]:
    """Returns a function that gathers parameters from the fsdp axis, to use them.

    Left to itself the compiler may move activations instead, which are larger. The sum
    of gradients over the chips leaves each with its own part.
    """
    gathered = jax.tree.map(_without_fsdp, shardings)

    @jax.custom_vjp
    def gather(params: Any) -> Any:
        return jax.lax.with_sharding_constraint(params, gathered)

    def forward(params: Any) -> tuple[Any, None]:
        return gather(params), None

    def backward(_: None, gradients: Any) -> tuple[Any]:
        return (jax.lax.with_sharding_constraint(gradients, shardings),)

    gather.defvjp(forward, backward)
    return gather


def _without_fsdp(sharding: NamedSharding) -> NamedSharding:
    spec = [None if entry == "fsdp" else entry for entry in sharding.spec]
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))

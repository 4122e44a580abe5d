"""Which mesh axes each parameter, and with it the optimizer's state, is split over."""

import re
from collections.abc import Mapping
from typing import Any

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

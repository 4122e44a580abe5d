"""Processes and their mesh, and what is split over which of its axes."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from task import UserError

# Batches are split over the first two; fsdp splits parameters too, and tensor the work
# on one sequence.
AXES = ("data", "fsdp", "tensor")
BATCH = PartitionSpec(("data", "fsdp"))


def mesh_sizes(text: str) -> dict[str, int]:
    """Reads the sizes of a mesh, such as "data=2,fsdp=4"; "auto" leaves all open."""
    sizes: dict[str, int] = {}
    for part in [] if text == "auto" else text.split(","):
        name, _, size = part.partition("=")
        if name not in AXES or name in sizes or not size.isdecimal() or int(size) < 1:
            raise UserError(f"--mesh {text}: must be like data=2,fsdp=4,tensor=1")
        sizes[name] = int(size)
    return sizes


def make_mesh(
    sizes: Mapping[str, int] | None = None, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Arranges devices in a mesh with the axes data, fsdp and tensor.

    Args:
        sizes: Sizes of some axes. The size of data is by default what the others leave.
        devices: The devices, by default those of all processes.

    Raises:
        UserError: The sizes do not fit the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = dict(sizes or {})
    sizes.setdefault("data", max(len(devices) // math.prod(sizes.values()), 1))
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    if math.prod(shape) != len(devices):
        given = ",".join(f"{axis}={n}" for axis, n in sizes.items())
        raise UserError(f"--mesh {given}: there are {len(devices)} devices")
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices > 1:
        # The axis that communicates least goes over the network between TPU slices.
        if shape[0] % slices:
            raise UserError(
                f"--mesh: data={shape[0]} must be a multiple of the {slices} slices"
            )
        array = mesh_utils.create_hybrid_device_mesh(
            (shape[0] // slices, *shape[1:]), (slices, 1, 1), devices
        )
        return Mesh(array, AXES, axis_types=(AxisType.Auto,) * 3)
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def data_part(mesh: Mesh) -> tuple[int, int]:
    """Returns which part of each batch this process loads, and of how many.

    Processes that share sequences, as the tensor axis does, load the same part.

    Raises:
        UserError: The devices of this process do not form such a part.
    """
    rows = mesh.devices.reshape(-1, mesh.shape["tensor"])
    mine = [
        i
        for i, row in enumerate(rows)
        if any(device.process_index == jax.process_index() for device in row)
    ]
    count, remainder = divmod(len(rows), len(mine))
    index = mine[0] // len(mine)
    if remainder or mine != list(range(index * len(mine), (index + 1) * len(mine))):
        raise UserError("--mesh: the devices of a process must be neighbours in it")
    return index, count


def put_batch(batch: Any, mesh: Mesh, axis: int = 0) -> Any:
    """Makes global arrays of this process's part of a batch, spread along an axis."""
    sharding = NamedSharding(mesh, PartitionSpec(*[None] * axis, *BATCH))
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(sharding, x), dict(batch)
    )


def check_batch_size(batch_size: int, accumulate: int, mesh: Mesh) -> None:
    """Raises UserError unless each device gets as many sequences as any other."""
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % (parts * accumulate):
        raise UserError(
            f"--batch-size {batch_size}: must be a multiple of {parts * accumulate}, "
            f"{parts} device(s) times --accumulate {accumulate}"
        )


def to_host(tree: Any) -> Any:
    """Returns NumPy arrays of whole arrays, in every process."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def ask_first(question: Callable[[], str]) -> str:
    """Returns the first process's answer, or raises its UserError, in all processes."""
    if not jax.distributed.is_initialized():
        return question()
    answer, failed = "", False
    if jax.process_index() == 0:
        try:
            answer = question()
        except UserError as error:
            answer, failed = str(error), True
    content = np.zeros(4096, np.uint8)
    encoded = np.frombuffer(answer.encode()[: content.size], np.uint8)
    content[: len(encoded)] = encoded
    content, failed = multihost_utils.broadcast_one_to_all((content, np.array(failed)))
    answer = np.asarray(content).tobytes().rstrip(b"\0").decode(errors="ignore")
    if failed:
        raise UserError(answer)
    return answer


def any_process(flag: bool) -> bool:
    """Returns whether the flag is set in any process; all have to ask."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


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

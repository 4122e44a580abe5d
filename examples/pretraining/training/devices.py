"""Processes and devices: the mesh, and batches spread over it."""

import argparse
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from glob import glob
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from pretraining.errors import UserError

# Batches are split over the first two; fsdp splits parameters too, and tensor the work
# on one sequence.
AXES = ("data", "fsdp", "tensor")
BATCH = PartitionSpec(("data", "fsdp"))


def connect() -> None:
    """Joins the other processes of this run, if there are any; call it first of all.

    Only the first process prints from then on.

    TPU slices and Slurm tell JAX what it needs. Elsewhere JAX_COORDINATOR_ADDRESS
    (host:port of the first process), JAX_NUM_PROCESSES and JAX_PROCESS_ID do.

    Raises:
        UserError: JAX_PLATFORMS asks for devices that are not there, or one of the
            other variables is missing or no such number.
    """
    if "JAX_NUM_PROCESSES" in os.environ:
        processes = _variable("JAX_NUM_PROCESSES", range(1, 2**31))
        index = _variable("JAX_PROCESS_ID", range(processes))
        address = os.environ.get("JAX_COORDINATOR_ADDRESS", "")
        host, _, port = address.rpartition(":")
        if not (host and port.isdecimal() and int(port) in range(1, 2**16)):
            raise UserError(
                f"JAX_COORDINATOR_ADDRESS={address}: must be a host:port, of the first "
                "process"
            )
        jax.distributed.initialize(num_processes=processes, process_id=index)
    elif _is_slurm_task() or _has_tpu():
        jax.distributed.initialize()
    if platforms := os.environ.get("JAX_PLATFORMS"):
        try:
            jax.default_backend()
        except (RuntimeError, AssertionError) as error:  # CUDA without a GPU asserts.
            reason = " ".join(str(error).split())[:200] or "there is no such device"
            raise UserError(f"JAX_PLATFORMS={platforms}: {reason}") from error
    if jax.distributed.is_initialized() and not is_first_process():
        sys.stdout = open(os.devnull, "w")


def _variable(name: str, allowed: range) -> int:
    text = os.environ.get(name, "")
    if not text.isdecimal() or int(text) not in allowed:
        raise UserError(
            f"{name}={text}: must be a whole number from {allowed[0]} to {allowed[-1]}"
        )
    return int(text)


def _is_slurm_task() -> bool:
    """Whether `srun` started this: a shell of an allocation has not all of these."""
    task = {"SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID"} <= os.environ.keys()
    return task and int(os.environ.get("SLURM_NTASKS", 1)) > 1


def _has_tpu() -> bool:
    chips = glob("/dev/accel[0-9]*") + glob("/dev/vfio/[0-9]*")
    return bool(chips) and "tpu" in os.environ.get("JAX_PLATFORMS", "tpu")


def is_first_process() -> bool:
    """Whether this process is the one that talks and writes files."""
    return jax.process_index() == 0


def ask_first(question: Callable[[], str]) -> str:
    """Returns the first process's answer in all processes.

    Raises:
        UserError: The first one did.
    """
    if not jax.distributed.is_initialized():
        return question()
    answer, failed = "", False
    if is_first_process():
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
    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


def mesh_sizes(text: str) -> dict[str, int]:
    """Reads a mesh such as "data=2,fsdp=4", or "auto"; an `argparse` type."""
    sizes: dict[str, int] = {}
    if text == "auto":
        return sizes
    for part in text.split(","):
        name, _, size = part.partition("=")
        if name not in AXES or name in sizes or not size.isdecimal() or int(size) < 1:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not like data=2,fsdp=4,tensor=1"
            )
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


def compute_dtype() -> DTypeLike:
    """bfloat16 on accelerators; CPUs would emulate it, slowly."""
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16

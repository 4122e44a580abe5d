"""Placement: parameters on every device, batches spread over them."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from pretraining.errors import UserError


def make_mesh() -> Mesh:
    """One data-parallel axis over all devices of all processes."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """Makes global arrays of this process's part of a batch."""
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(sharding, x), dict(batch)
    )


def check_batch_size(batch_size: int, accumulate: int, mesh: Mesh) -> None:
    """Raises UserError unless each device gets as many sequences as any other."""
    devices = mesh.shape["data"]
    if batch_size % (devices * accumulate):
        raise UserError(
            f"--batch-size {batch_size}: must be a multiple of {devices * accumulate}, "
            f"{devices} device(s) times --accumulate {accumulate}"
        )


def compute_dtype() -> jnp.dtype:
    """bfloat16 on accelerators; CPUs would emulate it, slowly."""
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16

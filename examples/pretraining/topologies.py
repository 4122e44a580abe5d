"""Accelerators that aren't there, described well enough to compile for them."""

import dataclasses
import importlib.util
import os
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import topologies

from pretraining.errors import UserError

GIB = 2**30
HBM = {"v4": 32 * GIB, "v5e": 16 * GIB, "v5p": 95 * GIB, "v6e": 32 * GIB}


@dataclasses.dataclass(frozen=True)
class Target:
    """Chips to compile for.

    Attributes:
        name: Such as "32 v5e chips in 2 slices".
        devices: The chips.
        hbm: Bytes of memory of each.
    """

    name: str
    devices: Sequence[jax.Device]
    hbm: int


def tpu(topology: str, slices: int = 1) -> Target:
    """Returns TPU slices by their topology, such as "v5e:4x4".

    Needs the `tpu` extra (libtpu) and no TPU. JAX itself has to run on another
    platform: call it before anything else uses JAX, or with JAX_PLATFORMS=cpu.

    Raises:
        UserError: There is no such topology, or libtpu is not installed.
    """
    generation = topology.partition(":")[0]
    if generation not in HBM:
        raise UserError(f"--topology {topology}: known are {', '.join(HBM)}")
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("libtpu is missing: pip install 'came-optax[tpu]'")
    jax.config.update("jax_platforms", "cpu")
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",  # Ask no metadata server what machine this is.
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # Any will do.
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # No chip is opened, none contended.
    }.items():
        os.environ.setdefault(name, value)
    several: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    try:
        description = topologies.get_topology_desc(
            platform="tpu", topology_name=topology, **several
        )
    except Exception as error:  # libtpu raises nothing more specific.
        raise UserError(f"--topology {topology}: {error}") from error
    devices = description.devices
    name = f"{len(devices)} {generation} chips"
    if slices > 1:
        name += f" in {slices} slices"
    return Target(name, devices, HBM[generation])

"""Accelerators that aren't there, described well enough to compile for them."""

import dataclasses
import importlib.util
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

from task import UserError

GIB = 2**30
HBM = {"v4": 32 * GIB, "v5e": 16 * GIB, "v5p": 95 * GIB, "v6e": 32 * GIB}
H100 = Path(__file__).parent / "h100.textproto"


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


def set_effort(effort: float) -> None:
    """Sets what XLA spends on fast code: at -1 it compiles several times faster.

    The default is 0. JAX 0.11 has no such setting any more.
    """
    name = "jax_exec_time_optimization_effort"
    if hasattr(jax.config, name):
        jax.config.update(name, effort)


def target(topology: str, slices: int = 1) -> Target:
    """Returns chips by a topology such as "v5e:4x4" or "h100:2x8" (nodes x GPUs)."""
    if topology.startswith("h100:"):
        if slices > 1:
            raise UserError("--slices: of TPUs only; nodes of GPUs are as in h100:2x8")
        return h100(topology)
    return tpu(topology, slices)


def h100(topology: str) -> Target:
    """Returns H100 GPUs, such as "h100:8", or "h100:2x8" for two nodes of eight.

    Needs JAX's CUDA plugin and no GPU: call it before anything else uses JAX.

    Raises:
        UserError: There is no such topology, or the plugin is not installed.
    """
    found = re.fullmatch(r"h100:(?:(\d+)x)?(\d+)", topology)
    if found is None:
        raise UserError(f"--topology {topology}: must be like h100:8 or h100:2x8")
    if importlib.util.find_spec("jax_cuda12_plugin") is None:
        raise UserError(
            "JAX's CUDA plugin is missing: pip install --no-deps "
            f"jax-cuda12-plugin=={jax.__version__} jax-cuda12-pjrt=={jax.__version__}"
        )
    nodes, gpus = int(found[1] or 1), int(found[2])
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    # What would run kernels to see which is fastest.
    flags = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
    description = H100.read_text(encoding="utf-8")
    memory = re.search(r"device_memory_size: (\d+)", description)
    assert memory is not None
    devices = topologies.get_topology_desc(
        platform="cuda",
        topology_name="h100",
        target_config=description,
        topology=f"1x{nodes}x{gpus}",
    ).devices
    return Target(f"{len(devices)} H100 GPUs", devices, int(memory[1]))


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
        raise UserError("libtpu is missing: pip install -e '.[tpu]'")
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

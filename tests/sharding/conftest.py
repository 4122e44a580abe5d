"""Meshes over the eight CPU devices, or over a TPU slice that isn't there."""

import contextlib
import importlib.util
import math
import re
from typing import NamedTuple

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh


@pytest.fixture
def auto_mesh():
    """Makes meshes of ``Auto`` axes: ``auto_mesh(fsdp=4, tensor=2)``."""
    return lambda **sizes: _make_mesh(AxisType.Auto, **sizes)


@pytest.fixture
def explicit_mesh():
    """Makes meshes of ``Explicit`` axes and enters them, until the test ends."""

    def enter(**sizes):
        mesh = _make_mesh(AxisType.Explicit, **sizes)
        entered.enter_context(jax.set_mesh(mesh))
        return mesh

    with contextlib.ExitStack() as entered:
        yield enter


@pytest.fixture
def v5e_devices(monkeypatch):
    """The 16 chips of a TPU v5e:4x4 slice, to compile for."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed; it comes with the `tpu` extra")
    from jax.experimental import topologies

    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",  # Ask no metadata server what machine this is.
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # No chip is opened, so none is contended.
    }.items():
        monkeypatch.setenv(name, value)
    topology = topologies.get_topology_desc(topology_name="v5e:4x4", platform="tpu")
    # What is compiled needn't be fast.
    jax.config.update("jax_exec_time_optimization_effort", -1.0)
    yield topology.devices
    jax.config.update("jax_exec_time_optimization_effort", 0.0)


class Collective(NamedTuple):
    """One collective operation: its kind, and the bytes of each array it gives."""

    kind: str
    arrays: tuple[int, ...]

    @property
    def bytes(self):
        return sum(self.arrays)


@pytest.fixture
def collectives():
    """Lists those of a compiled program without loops, each channel once."""
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    pattern = rf" = (.*?) ({kinds})(-start)?\(.*?channel_id=(\d+)"

    def found_in(hlo):
        found = {}
        for result, kind, start, channel in re.findall(pattern, hlo):
            arrays = tuple(
                max(int(bits) // 8, 1)
                * math.prod(map(int, filter(None, shape.split(","))))
                for bits, shape in re.findall(r"[a-z]+(\d+)\[([\d,]*)\]", result)
            )
            if start and kind != "all-reduce":  # Of operands and results.
                arrays = arrays[len(arrays) // 2 :]
            found[channel] = Collective(kind, arrays)
        return list(found.values())

    return found_in


def _make_mesh(axis_type, **sizes):
    devices = np.array(jax.devices()[: np.prod(list(sizes.values()))])
    return Mesh(
        devices.reshape(tuple(sizes.values())),
        tuple(sizes),
        axis_types=(axis_type,) * len(sizes),
    )

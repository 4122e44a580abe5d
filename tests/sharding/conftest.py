"""Meshes over the eight CPU devices, or over a TPU slice that isn't there."""

import contextlib
import importlib.util

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


def _make_mesh(axis_type, **sizes):
    devices = np.array(jax.devices()[: np.prod(list(sizes.values()))])
    return Mesh(
        devices.reshape(tuple(sizes.values())),
        tuple(sizes),
        axis_types=(axis_type,) * len(sizes),
    )

"""Meshes over the eight CPU devices, or over a TPU slice that isn't there."""

import contextlib

import jax
import pytest
from jax.sharding import AxisType


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
def v5e_devices():
    """The 16 chips of a TPU v5e:4x4 slice, to compile for."""
    from compiling import topologies

    topologies.set_effort(-1.0)  # What is compiled needn't be fast.
    yield topologies.target("v5e:4x4").devices
    topologies.set_effort(0.0)


def _make_mesh(axis_type, **sizes):
    axis_types = (axis_type,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=axis_types)

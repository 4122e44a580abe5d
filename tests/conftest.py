"""Settings that every test shares."""

import collections
import importlib.util
import os

# Eight devices, so that sharding is tested on any machine; read when jax starts.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import hypothesis
import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Each example may compile, hence no deadline; derandomised, so that a failure in CI is
# the same failure here.
hypothesis.settings.register_profile(
    "default", max_examples=25, deadline=None, derandomize=True
)
hypothesis.settings.register_profile(
    "quick", max_examples=6, deadline=None, derandomize=True
)
hypothesis.settings.register_profile("nightly", max_examples=2_000, deadline=None)
hypothesis.settings.load_profile("default")

# Without the `parity` extra a plain `pytest` passes over its tests. A run that names
# tests/parity fails on the missing import instead.
if any(importlib.util.find_spec(name) is None for name in ("torch", "came_pytorch")):
    collect_ignore = ["parity"]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Skips what compiles for TPUs where libtpu is missing, and parts off the slow.

    Of the cases of a test marked `slow(but=n)`, n spread evenly are not slow.
    """
    if importlib.util.find_spec("libtpu") is None:
        without = pytest.mark.skip(reason="libtpu is missing; the `tpu` extra has it")
        for item in items:
            if item.get_closest_marker("tpu"):
                item.add_marker(without)
    cases = collections.defaultdict(list)
    for item in items:
        if (mark := item.get_closest_marker("slow")) and "but" in mark.kwargs:
            cases[item.parent, item.originalname, mark.kwargs["but"]].append(item)
    for (*_, n), group in cases.items():
        for i in range(n):
            quick = group[i * len(group) // n]
            quick.own_markers = [m for m in quick.own_markers if m.name != "slow"]


@pytest.fixture
def promotion():
    """As it is for a user: Optax promotes here and there."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield

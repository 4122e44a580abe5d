"""Which device this is, and what it can do at best."""

import importlib.metadata
import platform
import statistics
import subprocess
import time
from typing import Any

import jax
import jax.numpy as jnp
from measuring import ROOT

from on_accelerator.recorder import Recorder

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "torch", "came-pytorch")
REPEATS = 20
# Dense bfloat16, as the makers print them.
PEAK_TFLOPS = {
    "A100": 312,
    "H100": 989,
    "H200": 989,
    "TPU v4": 275,
    "TPU v5 lite": 197,
    "TPU v5": 459,
    "TPU v6 lite": 918,
}


def run(record: Recorder) -> None:
    """Records the device, what is installed, and two ceilings."""
    device = jax.devices()[0]
    record.write(
        device=device.device_kind,
        platform=device.platform,
        memory=memory_limit(device),
        peak_tflops=peak_tflops(device),
        driver=driver(),
        python=platform.python_version(),
        packages={name: version(name) for name in PACKAGES},
        commit=commit(),
        time=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    )
    with record.attempt(case="copy"):
        record.write(
            case="copy", gb_per_second=copy_rate(2**20 if record.nano else 2**30)
        )
    with record.attempt(case="matmul"):
        rate = matmul_rate(256 if record.nano else 8192)
        record.write(case="matmul", tflops=rate)


def memory_limit(device: jax.Device) -> int | None:
    """Returns the bytes that JAX may allocate on a device, or None for no limit."""
    stats = device.memory_stats() or {}
    limit = stats.get("bytes_limit")
    # What was reserved at the start can be less than what was asked for.
    return min(limit, stats.get("pool_bytes") or limit) if limit else None


def peak_tflops(device: jax.Device) -> int | None:
    """Returns the published rate of a device in bfloat16, if it is known."""
    known = [name for name in PEAK_TFLOPS if name in device.device_kind]
    return PEAK_TFLOPS[max(known, key=len)] if known else None


def copy_rate(size: int) -> float:
    """Returns GB/s, read and written, of negating an array of ``size`` bytes."""
    x = jnp.ones(size // 4)
    return 2e-9 * x.nbytes / seconds_of(jax.jit(jnp.negative, donate_argnums=0), x)


def matmul_rate(n: int) -> float:
    """Returns TFLOP/s of a product of square bfloat16 matrices of normal numbers."""
    keys = jax.random.split(jax.random.key(0))
    a, b = (jax.random.normal(key, (n, n), jnp.bfloat16) for key in keys)
    # Scaled, so that products of products stay finite.
    product = jax.jit(lambda a: (a @ b) * jnp.bfloat16(n**-0.5))
    return 2e-12 * n**3 / seconds_of(product, a)


def seconds_of(function: Any, x: jax.Array) -> float:
    """Returns the median time of applying a function to its own result."""
    seconds = []
    for _ in range(REPEATS):
        x = jax.block_until_ready(function(x))
        began = time.perf_counter()
        for _ in range(5):
            x = function(x)
        jax.block_until_ready(x)
        seconds.append((time.perf_counter() - began) / 5)
    return statistics.median(seconds)


def version(package: str) -> str | None:
    """Returns the version of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """Returns the commit that is checked out, with a mark if files were changed."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    return _output(command)


def driver() -> str | None:
    """Returns the version of NVIDIA's driver."""
    query = ["--query-gpu=driver_version", "--format=csv,noheader"]
    return _output(["nvidia-smi", *query])


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()

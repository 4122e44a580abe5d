"""One update of all parameters: jitted, compiled, counted and timed."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm

from measuring.examples import traffic

BASELINE = "AdamW"
WARMUP = 2  # Rounds that don't count.


def make_update(tx: optax.GradientTransformation) -> Any:
    """Returns a jitted ``(params, state, grads) -> (params, state)`` that donates."""

    def update(params: Any, state: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(update, donate_argnums=(0, 1))


def number(params: Any) -> int:
    """Returns how many parameters there are."""
    return sum(p.size for p in jax.tree.leaves(params))


def random_like(shapes: Any) -> Any:
    """Returns arrays of such shapes, normal and the same in each run."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda p: jnp.asarray(rng.standard_normal(p.shape, np.float32), p.dtype), shapes
    )


def count(
    tx: optax.GradientTransformation, params: Any, device: jax.Device
) -> dict[str, Any]:
    """Compiles one update of ``params`` for a device and returns what it takes."""
    sharding = jax.sharding.SingleDeviceSharding(device)
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        (params, jax.eval_shape(tx.init, params), params),
    )
    _, takes = compile_update(tx, *arguments)
    return takes


def compile_update(
    tx: optax.GradientTransformation, params: Any, state: Any, grads: Any
) -> tuple[Any, dict[str, Any]]:
    """Returns a compiled update, and what it takes."""
    jax.clear_caches()  # What another one traced would be found again.
    began = time.process_time()
    lowered = make_update(tx).lower(params, state, grads)
    traced = time.process_time()
    compiled = lowered.compile()
    seconds = time.process_time() - traced
    try:
        found = traffic(compiled.as_text())
        moved: dict[str, Any] = {
            "bytes/parameter": round(found.hbm_bytes / number(params), 2),
            "kernels": found.kernels,
        }
    except ValueError:  # It loops, as Muon's does.
        moved = {"bytes/parameter": "", "kernels": ""}
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    return compiled, moved | {
        "temporaries (MB)": round(temporaries / 1e6, 1),
        "traced in (CPU s)": round(traced - began, 1),
        "compiled in (CPU s)": round(seconds, 1),
    }


class Update:
    """Updates of random parameters, one a call.

    Attributes:
        state: The optimizer's.
        takes: What `compile_update` says.
    """

    def __init__(self, tx: optax.GradientTransformation, grads: Any):
        # Not the gradients themselves: they would be donated.
        self.params = jax.tree.map(jnp.copy, grads)
        self.state = jax.jit(tx.init)(self.params)
        self.grads = grads
        self._update, self.takes = compile_update(tx, self.params, self.state, grads)

    def start(self) -> Any:
        """Starts an update, and returns what will be ready when it is done."""
        self.params, self.state = self._update(self.params, self.state, self.grads)
        return self.params, self.state

    def __call__(self) -> None:
        """Makes one update."""
        jax.block_until_ready(self.start())


def time_in_turn(
    contestants: Mapping[str, Callable[[], None]], rounds: int
) -> dict[str, list[float]]:
    """Returns the seconds that each contestant takes in each round."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in tqdm.trange(WARMUP + rounds, unit="round", disable=None):
        for name, contestant in contestants.items():
            began = time.perf_counter()
            contestant()
            if turn >= WARMUP:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def ratios(seconds: Mapping[str, list[float]], name: str) -> list[float]:
    """Returns what a contestant took of the baseline's time, round by round."""
    pairs = zip(seconds[name], seconds[BASELINE], strict=True)
    return [mine / baseline for mine, baseline in pairs]

"""Does the device compute what plain code on the CPU computes?

Both start each step from the same state, so that a code that rounds the other way in
one step does not add to the next; and the device goes all steps on its own besides.
"""

import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from measuring import updates
from measuring.updates import plain

from came_optax import (
    Stacked,
    came,
    state_memory,
    steady_came,
    stochastic_apply_updates,
)
from on_accelerator.recorder import Recorder

STEPS = 10
# Of the standard deviation of a leaf.
LARGEST_ERROR = 1e-4
# Of the numbers in 16, 8 or 4 bits: what lies halfway may round the other way.
MOST_ROUNDED_OTHERWISE = 1e-3
MU_DTYPES = {
    "full": ("float32", "bfloat16", "int8", "int4"),
    "nano": ("float32", "int4"),
}
RULE = Stacked(where="stack")
TRACING = threading.Lock()
# steady_came has Nesterov momentum and corrects biases, came does neither.
FORMS = {"came": came, "steady_came": steady_came}
SHAPES = {
    "full": {"matrix": (768, 3072), "vector": (3072,), "stack": (4, 512, 1024)},
    "nano": {"matrix": (48, 96), "vector": (97,), "stack": (2, 48, 96)},
}


def run(record: Recorder) -> None:
    """Records the errors of every form, then rounding, donation and bytes."""
    cases = [(form, d, "float32") for form in FORMS for d in MU_DTYPES[record.size]]
    cases.append(("steady_came", "int8", "bfloat16"))
    with ThreadPoolExecutor(4) as pool:  # Nearly all of it is compilation.
        futures = [pool.submit(compare, *case, SHAPES[record.size]) for case in cases]
        for (form, mu_dtype, param_dtype), future in zip(cases, futures, strict=True):
            case = {"case": form, "mu_dtype": mu_dtype, "param_dtype": param_dtype}
            with record.attempt(**case):
                record.write(**case, **future.result())
    with record.attempt(case="stochastic rounding"):
        found = rounding(2**16 if record.nano else 2**22)
        record.write(case="stochastic rounding", **found)
    model = updates.gpt2_shapes("nano" if record.nano else "small")
    for mu_dtype in MU_DTYPES[record.size]:
        with record.attempt(case="memory", mu_dtype=mu_dtype):
            found = memory(came(1e-3, mu_dtype=mu_dtype), model)
            record.write(case="memory", mu_dtype=mu_dtype, **found)


def compare(
    form: str, mu_dtype: str, dtype: str, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Any]:
    """Returns how far updates and states on the device are from those on the CPU.

    There the algorithm is as it is written, without any platform's schedule.
    """
    tx = FORMS[form](1.0, mu_dtype=mu_dtype, factoring=RULE)
    cpu, device = jax.devices("cpu")[0], jax.devices()[0]
    params = {k: np.zeros(s, jnp.dtype(dtype)) for k, s in shapes.items()}
    state = tx.init(params)
    arguments = params, tx.init(params), params
    with TRACING:  # It is the whole process that traces by other schedules.
        lowered = jax.jit(tx.update).lower(*jax.device_put(arguments, device))
        with plain():
            # Another function: the first is traced already.
            update = jax.jit(lambda *arguments: tx.update(*arguments))
            by_cpu = update.lower(*jax.device_put(arguments, cpu))
    there, here = lowered.compile(), by_cpu.compile()
    _, own, _ = jax.device_put(arguments, device)
    _, state, _ = jax.device_put(arguments, cpu)
    errors, rounded = [], []
    for grads in gradients(shapes, jnp.dtype(dtype)):
        found = there(*jax.device_put((grads, state, params), device))
        own_updates, own = there(*jax.device_put((grads, own, params), device))
        expected = here(*jax.device_put((grads, state, params), cpu))
        error, otherwise = differences(found, expected)
        errors.append(error)
        rounded.append(otherwise)
        expected_updates, state = expected
    # Not max(): that passes over NaN.
    error, otherwise = float(np.max(errors)), float(np.max(rounded))
    return {
        "error": error,
        "rounded otherwise": otherwise,
        "error of its own": rms_error(own_updates, expected_updates),
        "passed": error <= LARGEST_ERROR and otherwise <= MOST_ROUNDED_OTHERWISE,
    }


def gradients(
    shapes: Mapping[str, tuple[int, ...]], dtype: Any
) -> Iterator[dict[str, np.ndarray]]:
    """Yields gradients whose rows and columns differ in size, or factoring is easy."""
    rng = np.random.default_rng(0)

    def sizes(shape: tuple[int, ...]) -> Any:
        per_column = rng.standard_normal(shape[-1:])
        per_row = rng.standard_normal((*shape[-2:-1], 1)) if len(shape) > 1 else 0.0
        return np.exp(per_row + per_column)

    of_leaf = {k: sizes(s) for k, s in shapes.items()}
    for _ in range(STEPS):
        yield {
            k: (of_leaf[k] * rng.standard_normal(s)).astype(dtype)
            for k, s in shapes.items()
        }


def differences(found: Any, expected: Any) -> tuple[float, float]:
    """Returns the largest error in float32, and the share of other numbers that differ.

    The error is in standard deviations of the leaf.
    """
    largest, different, count = 0.0, 0, 0
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        if b.dtype == jnp.float32:
            a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
            scale = (b.std() or np.abs(b).max()) or 1.0
            # Not max(): that passes over NaN.
            largest = float(np.maximum(largest, np.abs(a - b).max() / scale))
        else:
            different += int(np.sum(np.asarray(a) != np.asarray(b)))
            count += a.size
    return largest, different / max(count, 1)


def rms_error(found: Any, expected: Any) -> float:
    """Returns the root mean square of the error over that of what is expected."""

    def flat(tree: Any) -> np.ndarray:
        leaves = [np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)]
        return np.concatenate(leaves)

    a, b = flat(found), flat(expected)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def rounding(n: int) -> dict[str, Any]:
    """Returns how far stochastic rounding's mean is from the exact sum."""
    step, gap = 0.3 / 128, 1 / 128
    params, steps = jnp.ones(n, jnp.bfloat16), jnp.full(n, step)
    new = jax.jit(stochastic_apply_updates)(params, steps, jax.random.key(0))
    new = np.asarray(new, np.float64)
    standard_error = gap * (0.3 * 0.7 / n) ** 0.5
    off = (new.mean() - 1 - step) / standard_error
    between = set(np.unique(new)) == {1.0, 1 + gap}
    return {"standard errors off": float(off), "passed": between and bool(abs(off) < 5)}


def memory(tx: optax.GradientTransformation, shapes: Any) -> dict[str, Any]:
    """Returns bytes of the state on the device, and whether updates need no more."""
    device = jax.devices()[0]
    params = updates.random_like(shapes)
    grads = jax.tree.map(jnp.copy, params)
    before = bytes_in_use(device)
    state = jax.block_until_ready(jax.jit(tx.init)(params))
    allocated = bytes_in_use(device) - before
    counted = state_memory(tx, shapes).total
    # Allocators round each array up: by 256 bytes, or a TPU's by a tile of 4 kB.
    slack = 4096 * len(jax.tree.leaves(state))
    update = updates.make_update(tx)
    in_use = []
    for _ in range(STEPS):
        donated = params, state
        params, state = jax.block_until_ready(update(params, state, grads))
        in_use.append(bytes_in_use(device))
    deleted = all(x.is_deleted() for x in jax.tree.leaves(donated))
    return {
        "state": counted,
        "allocated": allocated,
        "grown": in_use[-1] - in_use[1],
        "passed": deleted
        and in_use[-1] == in_use[1]
        and counted <= allocated <= counted + slack,
    }


def bytes_in_use(device: jax.Device) -> int:
    """Returns the bytes that are allocated on a device, or those of all arrays."""
    stats = device.memory_stats()
    return stats["bytes_in_use"] if stats else sum(x.nbytes for x in jax.live_arrays())

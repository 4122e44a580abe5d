"""Is it right on this GPU or TPU, and how fast?

On the first device that JAX finds, in this order:

    copy    what its memory copies at, which bounds every update
    values  updates and states beside those of the algorithm, as written, on the CPU
    update  the time of GPT-2 small's update, donated, and what share of a copy's speed
            it moves memory at
    step    GPT-2 small's training step in bfloat16

All goes into one table, a row an optimizer, and one JSON file, both written anew after
each measurement: whoever interrupts it keeps what was measured. It ends itself after
`--seconds`. On a CPU sizes are so small that they only try the code.

    python benchmarks/accelerator.py --output h100

The exit code is 1 if a value is wrong or something failed.
"""

import argparse
import functools
import pathlib
import signal
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from measuring import output
from measuring.examples import devices, gpt2, make_gpt2_task, make_init, make_train_step
from measuring.measurements import Measurements
from measuring.optimizers import OPTIMIZERS, OURS, Make, as_written
from measuring.updates import BASELINE, Update, number, random_like
from measuring.zoo import gpt2_shapes

from came_optax import Stacked

COMPARED: dict[str, Make] = {
    name: OPTIMIZERS[name]
    for name in (*OURS, "came_muon, int8", "AdamW", "Adafactor, momentum", "Muon")
}
IN_A_STEP = ("steady_came, float32", "steady_came, int8", BASELINE)
ROUNDS, AT_ONCE = 20, 5  # Rounds whose median counts, of so many updates or steps.
STEPS = 10  # Whose values are compared.
# Of the standard deviation of a leaf; and of the codes, as what lies halfway between
# two may round the other way.
LARGEST_ERROR, MOST_ROUNDED_OTHERWISE = 1e-4, 1e-3


def seconds_of(call: Callable[[], Any]) -> float:
    """Returns the median time of a call, of many between two looks at the clock."""
    call()
    seconds = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        for _ in range(AT_ONCE):
            done = call()
        jax.block_until_ready(done)
        seconds.append((time.perf_counter() - began) / AT_ONCE)
    return statistics.median(seconds)


def measure_copy(found: Measurements, size: str) -> None:
    """Adds the rate, read and written, of negating an array in its place."""
    x = jnp.ones(2**18 if size == "nano" else 2**28)
    negate = jax.jit(jnp.negative, donate_argnums=0)

    def copy() -> jax.Array:
        nonlocal x
        x = negate(x)
        return x

    found.facts["copy GB/s"] = round(2e-9 * x.nbytes / seconds_of(copy), 1)
    found.write("copy", found.facts["copy GB/s"], "GB/s")


def measure_values(found: Measurements, name: str, size: str) -> None:
    """Adds how far updates and states are from those on the CPU, as it is written.

    Both start each step from the same state, so that a code that rounds the other way
    in one step does not add to the next.
    """
    shapes = {
        "matrix": (48, 96) if size == "nano" else (768, 3072),
        "vector": (97,),
        "stack": (2, 48, 96) if size == "nano" else (4, 512, 1024),
    }
    tx = OURS[name](factoring=Stacked(where="stack"))
    params = {k: np.zeros(shape, np.float32) for k, shape in shapes.items()}
    cpu, device = jax.devices("cpu")[0], jax.devices()[0]

    there, here = jax.jit(tx.update), jax.jit(as_written(tx).update)
    state = jax.device_put(tx.init(params), cpu)
    errors, rounded = [], []
    for grads in gradients(shapes):
        arguments = (grads, state, params)
        computed = there(*jax.device_put(arguments, device))
        expected = here(*jax.device_put(arguments, cpu))
        error, otherwise = differences(computed, expected)
        errors.append(error)
        rounded.append(otherwise)
        _, state = expected
    # Not max(): that passes over NaN.
    error, otherwise = float(np.max(errors)), float(np.max(rounded))
    found.add(
        name,
        **{"error": float(f"{error:.2g}"), "rounded otherwise": round(otherwise, 6)},
    )
    if not (error <= LARGEST_ERROR and otherwise <= MOST_ROUNDED_OTHERWISE):
        found.fail(f"values of {name}", f"error {error}, {otherwise} of the codes")


def gradients(shapes: Mapping[str, tuple[int, ...]]) -> list[dict[str, np.ndarray]]:
    """Returns gradients whose rows and columns differ in size, so that it matters."""
    rng = np.random.default_rng(0)
    sizes = {
        k: np.exp(rng.standard_normal(s[-1:]) + rng.standard_normal((*s[:-1], 1)))
        if len(s) > 1
        else np.exp(rng.standard_normal(s))
        for k, s in shapes.items()
    }
    return [
        {
            k: (sizes[k] * rng.standard_normal(s)).astype(np.float32)
            for k, s in shapes.items()
        }
        for _ in range(STEPS)
    ]


def differences(found: Any, expected: Any) -> tuple[float, float]:
    """Returns the largest error in float32, and the share of other numbers that differ.

    The error is in standard deviations of the leaf.
    """
    largest, different, count = 0.0, 0, 0
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        if b.dtype == jnp.float32:
            a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
            scale = b.std() or np.abs(b).max() or 1.0
            largest = float(np.maximum(largest, np.abs(a - b).max() / scale))
        else:
            different += int(np.sum(np.asarray(a) != np.asarray(b)))
            count += a.size
    return largest, different / max(count, 1)


@functools.cache
def random_gpt2(size: str) -> Any:
    return random_like(gpt2_shapes(size))


def measure_update(found: Measurements, name: str, size: str) -> None:
    """Adds the time of an update of a GPT-2, what it moves and what it takes."""
    update = Update(COMPARED[name](), random_gpt2(size))
    seconds = seconds_of(update.start)
    state = sum(x.nbytes for x in jax.tree.leaves(update.state))
    row = {
        "update (ms)": round(1e3 * seconds, 4),
        "state (MB)": round(1e-6 * state, 1),
    }
    if moved := update.takes["bytes/parameter"]:
        rate = 1e-9 * moved * number(update.grads) / seconds
        row |= {"GB/s": round(rate, 1)}
        row |= {"of a copy's": round(rate / found.facts["copy GB/s"], 3)}
    found.add(name, **row, **update.takes)


def measure_step(found: Measurements, name: str, size: str, batch_size: int) -> None:
    """Adds the time of a GPT-2's whole training step, and the memory that it needs."""
    task = make_gpt2_task(size, "float32" if size == "nano" else "bfloat16")
    mesh, tx = devices.make_mesh({}, [jax.devices()[0]]), OPTIMIZERS[name]()
    length, vocabulary = task.tokens_per_record, gpt2.SIZES[size].vocab_size
    rng = np.random.default_rng(0)
    tokens = rng.integers(vocabulary, size=(batch_size, length + 1), dtype=np.int32)
    weight = np.ones(batch_size, np.float32)
    batch = devices.put_batch({"tokens": tokens, "weight": weight}, mesh)
    state = make_init(task, tx, mesh)(0)
    train_step = make_train_step(task, tx, 1, 0, mesh).lower(state, batch).compile()
    sizes: Any = train_step.memory_analysis()
    # The state is donated: what comes out lies where it lay.
    needed = sizes.argument_size_in_bytes + sizes.temp_size_in_bytes

    def step() -> Any:
        nonlocal state
        state, metrics = train_step(state, batch)
        return metrics["loss"]

    first, seconds, last = float(step()), seconds_of(step), float(step())
    row = {
        "step (ms)": round(1e3 * seconds, 3),
        "tokens/s": round(batch_size * length / seconds),
        "step needs (GB)": round(1e-9 * needed, 3),
    }
    found.add(name, **row)
    if not last < first:
        found.fail(f"step of {name}", f"the loss went from {first} to {last}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--size",
        choices=gpt2.SIZES,
        help="of GPT-2; nano tries the code (default: small, or nano on a CPU)",
    )
    parser.add_argument("--batch-size", type=int, default=8, help="of the step")
    parser.add_argument("--seconds", type=int, default=470, help="to end after")
    parser.add_argument("--output", type=pathlib.Path, default=output.DEFAULT)
    args = parser.parse_args()

    # Ends the process wherever it is, as a compiler would let no exception through.
    signal.alarm(args.seconds)
    device = jax.devices()[0]
    size = args.size or ("nano" if device.platform == "cpu" else "small")
    found = Measurements(
        args.output,
        device=device.device_kind,
        model=f"gpt2 {size}",
        jax=jax.__version__,
    )
    measure_copy(found, size)
    jobs: list[tuple[str, Callable[..., None], str]] = [
        *(("values", measure_values, name) for name in OURS),
        *(("update", measure_update, name) for name in COMPARED),
        *(
            ("step", functools.partial(measure_step, batch_size=args.batch_size), name)
            for name in IN_A_STEP
        ),
    ]
    for what, measure, name in jobs:
        try:
            measure(found, name, size)
        except Exception as error:  # What comes next is measured all the same.
            found.fail(f"{what} of {name}", f"{type(error).__name__}: {error}")
    print(f"\n{found.table()}\n\n{args.output}")
    sys.exit(1 if found.failed else 0)


if __name__ == "__main__":
    main()

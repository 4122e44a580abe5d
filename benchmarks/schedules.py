"""What does each platform's schedule pay for?

The library computes the algorithm in an order and a form that suits the compiler of
each platform (`came_optax/_schedules`). This measures CAME's update of a GPT-2 by the
algorithm as it is written, and by its own schedule. On the CPU times are ratios to
AdamW, in turn with it; for a chip that need not be there, bytes are counted in the
compiled update:

    python benchmarks/schedules.py
    python benchmarks/schedules.py --chip v5e
    python benchmarks/schedules.py --chip v5p --matrix 4096 16384
"""

import argparse
import contextlib
import pathlib
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from compiled_traffic import measure
from measuring import output, updates
from measuring.chips import CHIPS, target
from update import BASELINE, JaxUpdate, ratios, time_in_turn

from pretraining.models import gpt2

TAKES = ("bytes/parameter", "temporaries (MB)", "compiled in (CPU s)")
SCHEDULES: dict[str, Callable[[], contextlib.AbstractContextManager[None]]] = {
    "plain": updates.plain,
    "own": contextlib.nullcontext,
}
MU_DTYPES = ("float32", "bfloat16", "int8", "int4")


def compiled(chip: str, params: Any, mu_dtype: str) -> list[dict[str, Any]]:
    """Counts the bytes of the update by each schedule."""
    device = target(chip).devices[0]
    rows = []
    for name, schedule in SCHEDULES.items():
        with schedule():
            found = measure(updates.OPTIMIZERS[f"CAME, {mu_dtype}"](), params, device)
        rows.append({"schedule": name} | {take: found[take] for take in TAKES})
    return rows


def timed(params: Any, mu_dtype: str, rounds: int) -> list[dict[str, Any]]:
    """Times the update by each schedule."""
    grads = updates.random_like(params)
    contestants: dict[str, Any] = {
        BASELINE: JaxUpdate(updates.OPTIMIZERS[BASELINE](), grads)
    }
    for name, schedule in SCHEDULES.items():
        with schedule():
            tx = updates.OPTIMIZERS[f"CAME, {mu_dtype}"]()
            contestants[name] = JaxUpdate(tx, grads)
    seconds = time_in_turn(contestants, rounds)
    del contestants[BASELINE]
    return [
        {
            "schedule": name,
            "to AdamW": f"{statistics.median(ratios(seconds, name)):.2f}",
        }
        | {take: contestant.takes[take] for take in TAKES}
        for name, contestant in contestants.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chip", choices=["cpu", *CHIPS], default="cpu")
    parser.add_argument("--size", choices=gpt2.SIZES, default="small")
    parser.add_argument(
        "--matrix",
        type=int,
        nargs=2,
        metavar=("ROWS", "COLUMNS"),
        help="one float32 matrix in place of a GPT-2",
    )
    parser.add_argument("--rounds", type=int, default=20, help="on CPU")
    parser.add_argument("--output", type=pathlib.Path, default=output.DEFAULT)
    args = parser.parse_args()

    if args.chip != "cpu":
        target(args.chip)  # Before anything else uses JAX.
    name, params = f"schedules_{args.chip}", updates.gpt2_shapes(args.size)
    if args.matrix is not None:
        params = [jax.ShapeDtypeStruct(tuple(args.matrix), jnp.float32)]
        name += "_{}x{}".format(*args.matrix)
    rows = []
    for mu_dtype in MU_DTYPES:
        found = (
            timed(params, mu_dtype, args.rounds)
            if args.chip == "cpu"
            else compiled(args.chip, params, mu_dtype)
        )
        rows += [{args.chip: f"CAME, {mu_dtype}"} | row for row in found]
    output.write(args.output, name, rows, jax=jax.__version__)


if __name__ == "__main__":
    main()

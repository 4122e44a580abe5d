"""What does each platform's schedule pay for?

The library computes the algorithm in an order and a form that suits the compiler of
each platform (`came_optax/_schedules`). This measures our updates of a GPT-2 by the
algorithm as it is written, and by its own schedule. On the CPU times are ratios to
AdamW, in turn with it; for a chip that need not be there, bytes are counted in the
compiled update:

    python benchmarks/schedules.py
    python benchmarks/schedules.py --chip v5e
"""

import argparse
import contextlib
import pathlib
import statistics
from collections.abc import Callable
from typing import Any

import jax
from measuring import output
from measuring.chips import CHIPS, target
from measuring.examples import gpt2
from measuring.optimizers import OPTIMIZERS, OURS, plain
from measuring.updates import BASELINE, Update, count, random_like, ratios, time_in_turn
from measuring.zoo import gpt2_shapes

TAKES = ("bytes/parameter", "kernels", "temporaries (MB)", "compiled in (CPU s)")
SCHEDULES: dict[str, Callable[[], contextlib.AbstractContextManager[None]]] = {
    "plain": plain,
    "own": contextlib.nullcontext,
}


def compiled(chip: str, params: Any, optimizer: str) -> list[dict[str, Any]]:
    """Counts the bytes of the update by each schedule."""
    device = target(chip).devices[0]
    rows = []
    for name, schedule in SCHEDULES.items():
        with schedule():
            found = count(OURS[optimizer](), params, device)
        rows.append({"schedule": name} | {take: found[take] for take in TAKES})
    return rows


def timed(params: Any, optimizer: str, rounds: int) -> list[dict[str, Any]]:
    """Times the update by each schedule."""
    grads = random_like(params)
    contestants = {BASELINE: Update(OPTIMIZERS[BASELINE](), grads)}
    for name, schedule in SCHEDULES.items():
        with schedule():
            contestants[name] = Update(OURS[optimizer](), grads)
    seconds = time_in_turn(contestants, rounds)
    return [
        {
            "schedule": name,
            "to AdamW": f"{statistics.median(ratios(seconds, name)):.2f}",
        }
        | {take: contestants[name].takes[take] for take in TAKES}
        for name in SCHEDULES
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chip", choices=["cpu", *CHIPS], default="cpu")
    parser.add_argument("--size", choices=gpt2.SIZES, default="small")
    parser.add_argument("--rounds", type=int, default=20, help="on CPU")
    parser.add_argument("--output", type=pathlib.Path, default=output.DEFAULT)
    args = parser.parse_args()

    if args.chip != "cpu":
        target(args.chip)  # Before anything else uses JAX.
    params = gpt2_shapes(args.size)
    rows = []
    for optimizer in OURS:
        found = (
            timed(params, optimizer, args.rounds)
            if args.chip == "cpu"
            else compiled(args.chip, params, optimizer)
        )
        rows += [{args.chip: optimizer} | row for row in found]
    output.write(args.output, f"schedules_{args.chip}", rows, jax=jax.__version__)


if __name__ == "__main__":
    main()

"""What does each choice by platform in the library pay for?

The library computes a few things differently on CPUs, GPUs and TPUs, by
`jax.lax.platform_dependent`. This measures CAME's update of a GPT-2 as it is, and again
with one of these choices left out, so that the function that makes it does on every
platform what is the default. On the CPU times are ratios to AdamW, in turn with it; for
a chip that need not be there, bytes are counted in the compiled update:

    python benchmarks/switches.py
    python benchmarks/switches.py --chip v5e
    python benchmarks/switches.py --chip v5p --matrix 4096 16384
"""

import argparse
import contextlib
import pathlib
import statistics
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from compiled_traffic import measure
from measuring import output, updates
from measuring.chips import CHIPS, target
from update import BASELINE, JaxUpdate, ratios, time_in_turn

from pretraining.models import gpt2

NOTHING: tuple[str, ...] = ()
TAKES = ("bytes/parameter", "temporaries (MB)", "compiled in (CPU s)")
TOGETHER = ("residuals", "average")  # One takes what the other returns.


@contextlib.contextmanager
def leaving_out(functions: tuple[str, ...]) -> Iterator[None]:
    """Makes the library's ``functions`` choose what is the default, everywhere."""
    choose = jax.lax.platform_dependent

    def by_default(*args: Any, default: Callable[..., Any], **by_platform: Any) -> Any:
        if sys._getframe(1).f_code.co_name in functions:
            return default(*args)
        return choose(*args, default=default, **by_platform)

    jax.clear_caches()  # Leaves are traced once for each shape.
    with mock.patch.object(jax.lax, "platform_dependent", by_default):
        yield
    jax.clear_caches()


def variants(params: Any, mu_dtype: str, platform: str) -> list[tuple[str, ...]]:
    """Returns nothing, and what an update chooses for a platform, one by one."""
    choose, found = jax.lax.platform_dependent, {}

    def recorded(*args: Any, **branches: Any) -> Any:
        if platform in branches:
            function = sys._getframe(1).f_code.co_name
            found[TOGETHER if function in TOGETHER else (function,)] = True
        return choose(*args, **branches)

    tx = updates.OPTIMIZERS[f"CAME, {mu_dtype}"]()
    jax.clear_caches()
    with mock.patch.object(jax.lax, "platform_dependent", recorded):
        jax.eval_shape(tx.update, params, jax.eval_shape(tx.init, params), params)
    return [NOTHING, *found]


def compiled(chip: str, params: Any, mu_dtype: str) -> list[dict[str, Any]]:
    """Counts the bytes of the update as it is, and without each choice."""
    device = target(chip).devices[0]
    platform = "cuda" if chip == "h100" else "tpu"
    rows = []
    for functions in variants(params, mu_dtype, platform):
        with leaving_out(functions):
            found = measure(updates.OPTIMIZERS[f"CAME, {mu_dtype}"](), params, device)
        rows.append(
            {"without": label(functions)} | {name: found[name] for name in TAKES}
        )
    return rows


def timed(params: Any, mu_dtype: str, rounds: int) -> list[dict[str, Any]]:
    """Times the update as it is, and without each choice."""
    grads = updates.random_like(params)
    contestants: dict[str, Any] = {
        BASELINE: JaxUpdate(updates.OPTIMIZERS[BASELINE](), grads)
    }
    for functions in variants(params, mu_dtype, "cpu"):
        with leaving_out(functions):
            tx = updates.OPTIMIZERS[f"CAME, {mu_dtype}"]()
            contestants[label(functions)] = JaxUpdate(tx, grads)
    seconds = time_in_turn(contestants, rounds)
    del contestants[BASELINE]
    return [
        {"without": name, "to AdamW": f"{statistics.median(ratios(seconds, name)):.2f}"}
        | {kind: contestant.takes[kind] for kind in TAKES}
        for name, contestant in contestants.items()
    ]


def label(functions: tuple[str, ...]) -> str:
    return ", ".join(functions) or "nothing"


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
    name, params = f"switches_{args.chip}", updates.gpt2_shapes(args.size)
    if args.matrix is not None:
        params = [jax.ShapeDtypeStruct(tuple(args.matrix), jnp.float32)]
        name += "_{}x{}".format(*args.matrix)
    rows = []
    for mu_dtype in ("float32", "int8"):
        found = (
            timed(params, mu_dtype, args.rounds)
            if args.chip == "cpu"
            else compiled(args.chip, params, mu_dtype)
        )
        rows += [{args.chip: f"CAME, {mu_dtype}"} | row for row in found]
    output.write(args.output, name, rows, jax=jax.__version__)


if __name__ == "__main__":
    main()

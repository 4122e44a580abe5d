"""What share of a training step is the optimizer, on this machine?

Times training steps of the example's GPT-2 and the update alone, in turn, with few
tokens a step and with many:

    python benchmarks/optimizer_share.py
"""

import argparse
import pathlib
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import optax
from measuring import output
from measuring.examples import (
    devices,
    gpt2,
    make_gpt2_task,
    make_init,
    make_train_step,
)
from measuring.optimizers import OPTIMIZERS
from measuring.updates import make_update, time_in_turn

NAMES = (
    "steady_came, float32",
    "steady_came, int8",
    "came_muon, int8",
    "came, float32",
    "AdamW",
)


def share(
    tx: optax.GradientTransformation, size: str, batch_size: int, rounds: int
) -> dict[str, Any]:
    """Compares the times of a GPT-2's update and of its step."""
    task, mesh = make_gpt2_task(size, "float32"), devices.make_mesh()
    tokens = jnp.zeros((batch_size, task.tokens_per_record + 1), jnp.int32)
    batch = {"tokens": tokens, "weight": jnp.ones(batch_size)}
    train_step = make_train_step(task, tx, 1, 0, mesh)
    state = make_init(task, tx, mesh)(0)
    params, opt_state, grads = jax.tree.map(
        jnp.copy, (state.params, state.opt_state, state.params)
    )
    update_alone = make_update(tx)

    def step() -> None:
        nonlocal state
        state, _ = jax.block_until_ready(train_step(state, batch))

    def update() -> None:
        nonlocal params, opt_state
        new = update_alone(params, opt_state, grads)
        params, opt_state = jax.block_until_ready(new)

    seconds = time_in_turn({"step": step, "update": update}, rounds)
    medians = {name: 1e3 * statistics.median(s) for name, s in seconds.items()}
    return {
        "tokens": batch_size * task.tokens_per_record,
        **{f"{name} (ms)": f"{ms:.1f}" for name, ms in medians.items()},
        "share": f"{100 * medians['update'] / medians['step']:.1f} %",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=gpt2.SIZES, default="tiny")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[2, 32])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--output", type=pathlib.Path, default=output.DEFAULT)
    args = parser.parse_args()

    rows = [
        {f"GPT-2 {args.size}": name}
        | share(OPTIMIZERS[name](), args.size, batch_size, args.rounds)
        for batch_size in args.batch_sizes
        for name in NAMES
    ]
    about = {"rounds": args.rounds, "jax": jax.__version__}
    output.write(args.output, "optimizer_share", rows, **about)


if __name__ == "__main__":
    main()

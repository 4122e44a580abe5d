"""What share of a training step is the optimizer?

On the CPU, the share of the time of a GPT-2 tiny's step that the update alone takes,
both timed in turn. For a chip that need not be there, the share of the operations that
XLA counts in the step of a GPT-2 small, and of the bytes that its compiled kernels read
from and write to the chip's memory:

    python benchmarks/optimizer_share.py
    python benchmarks/optimizer_share.py --chip v5e
"""

import argparse
import pathlib
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import optax
from measuring import output
from measuring.chips import CHIPS, target
from measuring.examples import (
    devices,
    make_gpt2_task,
    make_init,
    make_train_step,
    state_shapes,
    traffic,
)
from measuring.optimizers import OPTIMIZERS
from measuring.updates import make_update, time_in_turn

NAMES = ("steady_came, float32", "steady_came, int8", "came, float32", "AdamW")


def lower(
    tx: optax.GradientTransformation, batch_size: int, device: jax.Device
) -> list[Any]:
    """Lowers the update of a GPT-2 small, and its whole training step, for a device."""
    task, mesh = make_gpt2_task("small", "bfloat16"), devices.make_mesh({}, [device])
    state = state_shapes(task, tx, mesh)
    sharding = jax.sharding.NamedSharding(mesh, devices.BATCH)
    tokens = (batch_size, task.tokens_per_record + 1)
    batch = {
        "tokens": jax.ShapeDtypeStruct(tokens, jnp.int32, sharding=sharding),
        "weight": jax.ShapeDtypeStruct(tokens[:1], jnp.float32, sharding=sharding),
    }
    return [
        make_update(tx).lower(state.params, state.opt_state, state.params),
        make_train_step(task, tx, 1, 0, mesh).lower(state, batch),
    ]


def compiled_share(
    tx: optax.GradientTransformation, batch_size: int, device: jax.Device
) -> dict[str, Any]:
    """Compares the costs of a GPT-2 small's update with those of its step."""
    # Operations are the same everywhere, but XLA counts none for absent GPUs.
    on_cpu = lower(tx, batch_size, jax.devices("cpu")[0])
    flops = [lowered.cost_analysis()["flops"] for lowered in on_cpu]
    compiled = [lowered.compile() for lowered in lower(tx, batch_size, device)]
    moved = [traffic(program.as_text()).hbm_bytes for program in compiled]
    return {
        f"{kind} (%)": f"{100 * update / step:.2f}"
        for kind, (update, step) in {"operations": flops, "bytes": moved}.items()
    }


def timed_share(
    tx: optax.GradientTransformation, size: str, batch_size: int, rounds: int
) -> dict[str, Any]:
    """Compares the times of a GPT-2's update and of its step on this machine."""
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
    return {f"{name} (ms)": f"{ms:.1f}" for name, ms in medians.items()} | {
        "time (%)": f"{100 * medians['update'] / medians['step']:.1f}"
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chip", choices=["cpu", *CHIPS], default="cpu")
    parser.add_argument("--size", default="tiny", help="on CPU (default: tiny)")
    parser.add_argument("--batch-size", type=int, help="default: 32 on CPU, or 4")
    parser.add_argument("--rounds", type=int, default=20, help="on CPU")
    parser.add_argument("--output", type=pathlib.Path, default=output.DEFAULT)
    args = parser.parse_args()

    rows = []
    for name in NAMES:
        make = OPTIMIZERS[name]
        if args.chip == "cpu":
            batch_size = args.batch_size or 32
            share = timed_share(make(), args.size, batch_size, args.rounds)
        else:
            device = target(args.chip).devices[0]
            share = compiled_share(make(), args.batch_size or 4, device)
        rows.append({args.chip: name} | share)
    output.write(args.output, f"optimizer_share_{args.chip}", rows, jax=jax.__version__)


if __name__ == "__main__":
    main()

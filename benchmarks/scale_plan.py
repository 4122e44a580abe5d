"""What do decoders of 7 and 70 billion parameters take on TPU slices, by optimizer?

Compiles training steps, which needs no TPU, and reads off the memory of a chip: GPT-2's
blocks in a scan over layers that recomputes them in the backward pass, float32
parameters, gradients and optimizer state in parts over all chips (FSDP), activations in
bfloat16, one sequence of 2,048 tokens per chip. For each optimizer it measures v5p
slices of 64 and 512 chips, and finds the smallest on which the step compiles.

    pip install -e ".[examples,tpu]"
    python benchmarks/scale_plan.py

takes about a minute of a CPU for each of some 20 cases. Results are kept in
docs/results/scale-plan, so that it goes on where it stopped; delete them to start anew.
"""

import argparse
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from measuring import ROOT, chips, output
from measuring.examples import (
    GIB,
    TrainState,
    ahead_of_time,
    devices,
    gpt2,
    make_gather,
    of_columns,
    param_shardings,
    topologies,
)

from came_optax import LastTwoAxes, Stacked, state_sharding, steady_came

RESULTS = ROOT / "docs" / "results" / "scale-plan"
LENGTH = 2048
LAYERS_AND_WIDTH = {"7B": (33, 4096), "70B": (86, 8192)}
FACTORING = Stacked(LastTwoAxes(), where="^layers/")
OPTIMIZERS: Mapping[str, optax.GradientTransformation] = {
    f"steady_came, {dtype}": steady_came(
        1e-4, weight_decay=0.1, factoring=FACTORING, mu_dtype=dtype
    )
    for dtype in ("float32", "int8")
} | {"AdamW": optax.adamw(1e-4, weight_decay=0.1)}
TOPOLOGIES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
SLICES = {math.prod(map(int, t.split("x"))): t for t in TOPOLOGIES}  # By chips.
PLANNED = (64, 512)


class Decoder(nnx.Module):
    """GPT-2 with its layers stacked, each gathered when its turn comes."""

    def __init__(self, layers: int, width: int, *, rngs: nnx.Rngs):
        # Heads of 128, and GPT-2's vocabulary made a multiple of 128.
        config = gpt2.GPT2Config(
            50304, LENGTH, width, layers, width // 128, dtype="bfloat16"
        )
        self.wte = nnx.Embed(50304, width, dtype=jnp.bfloat16, rngs=rngs)
        self.wpe = nnx.Embed(LENGTH, width, dtype=jnp.bfloat16, rngs=rngs)
        stack = nnx.vmap(lambda rngs: gpt2.Block(config, rngs=rngs))
        self.layers = nnx.split_rngs(splits=layers)(stack)(rngs)
        self.ln_f = nnx.LayerNorm(width, dtype=jnp.bfloat16, rngs=rngs)

    def __call__(self, tokens_BxL: jax.Array, gather: Any) -> jax.Array:
        """Returns logits; `gather` makes a layer's parameters whole."""
        x_BxLxD = self.wte(tokens_BxL) + self.wpe(jnp.arange(LENGTH)[None])
        graphdef, layers = nnx.split(self.layers)

        @jax.checkpoint
        def apply(x_BxLxD: jax.Array, layer: nnx.State) -> tuple[jax.Array, None]:
            return nnx.merge(graphdef, gather(layer))(x_BxLxD), None

        x_BxLxD, _ = jax.lax.scan(apply, x_BxLxD, layers)
        return self.ln_f(x_BxLxD) @ self.wte.embedding[...].astype(jnp.bfloat16).T


def make_step(
    model: str, tx: optax.GradientTransformation, mesh: jax.sharding.Mesh
) -> tuple[Any, TrainState]:
    """Returns `(state, tokens) -> (state, loss)`, and the state's shapes and places."""
    layers, width = LAYERS_AND_WIDTH[model]
    graphdef, params = nnx.split(
        nnx.eval_shape(lambda: Decoder(layers, width, rngs=nnx.Rngs(0)))
    )
    of_params = param_shardings(mesh, params, gpt2.GPT2.tensor_axes)
    shardings = TrainState(
        devices.replicated(mesh), of_params, state_sharding(tx, params, of_params)
    )
    of_layer = jax.tree.map(
        lambda s: NamedSharding(mesh, PartitionSpec(*s.spec[1:])), of_params["layers"]
    )
    others = [name for name in params if name != "layers"]
    gather_others = make_gather({name: of_params[name] for name in others})

    def loss_of(params: Any, tokens_BxL1: jax.Array) -> jax.Array:
        whole = gather_others({name: params[name] for name in others})
        decoder = nnx.merge(graphdef, nnx.State({**params, **whole}))
        logits_BxLxV = decoder(tokens_BxL1[:, :-1], make_gather(of_layer))
        return optax.softmax_cross_entropy_with_integer_labels(
            logits_BxLxV.astype(jnp.float32), tokens_BxL1[:, 1:]
        ).mean()

    def step(state: TrainState, tokens_BxL1: jax.Array) -> tuple[TrainState, jax.Array]:
        loss, grads = jax.value_and_grad(loss_of)(state.params, tokens_BxL1)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, opt_state), loss

    count = jax.ShapeDtypeStruct((), jnp.int32)
    state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        TrainState(count, params, jax.eval_shape(tx.init, params)),
        shardings,
    )
    places = (shardings, devices.replicated(mesh))
    return jax.jit(step, out_shardings=places, donate_argnums=0), state


def measure(model: str, optimizer: str, count: int) -> dict[str, Any]:
    """Returns what a chip holds of a training step on so many.

    Without compiling where parameters, their gradients and the state are too much.
    """
    target = chips.target(f"v5p:{SLICES[count]}")
    mesh = devices.make_mesh({"fsdp": count}, target.devices)
    step, state = make_step(model, OPTIMIZERS[optimizer], mesh)
    of_params, of_state = (
        ahead_of_time.bytes_per_chip(state.params),
        ahead_of_time.bytes_per_chip(state.opt_state),
    )
    total = 2 * of_params + of_state
    fits = compiled = total <= target.hbm
    if compiled:
        tokens = jax.ShapeDtypeStruct(
            (count, LENGTH + 1), jnp.int32, sharding=NamedSharding(mesh, devices.BATCH)
        )
        # A fifth of the time to compile, for somewhat more of temporaries.
        topologies.set_effort(-1.0)
        report = ahead_of_time.compile_step(step, state, tokens, target)
        if not report.fits:
            topologies.set_effort(0.0)
            report = ahead_of_time.compile_step(step, state, tokens, target)
        total, fits = report.total, report.fits
    return {
        "parameters": sum(p.size for p in jax.tree.leaves(state.params)),
        "state_bytes": of_state,
        "total_bytes": total,
        "fits": fits,
        "compiled": compiled,
    }


def write_table(results: dict[str, Any], planned: Sequence[int]) -> None:
    """Prints and writes state and total per chip, and the smallest slices."""
    rows = []
    for model, optimizer in itertools.product(LAYERS_AND_WIDTH, OPTIMIZERS):
        found: dict[int, Any] = {
            n: results.get(f"{model} {optimizer} {n}") for n in SLICES
        }
        first = found[planned[0]]
        smallest = min(n for n, case in found.items() if case and case["fits"])
        per_parameter = first["state_bytes"] * planned[0] / first["parameters"]
        row = {
            "training": f"{model}, {optimizer}",
            "state/parameter": f"{per_parameter:.2f} B",
        }
        for n in sorted(planned):
            state, total = (found[n][k] / GIB for k in ("state_bytes", "total_bytes"))
            row[f"{n} chips"] = f"{state:.2f} of {total:.2f}"
        total = found[smallest]["total_bytes"] / GIB
        rows.append(row | {"smallest slice": f"{smallest} chips: {total:.2f}"})
    table = of_columns(rows)
    print(table)
    output.replace(RESULTS / "table.md", table)


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    file = RESULTS / "results.json"
    results = json.loads(file.read_text()) if file.exists() else {}

    def fits(case: tuple[str, str], count: int) -> bool:
        name = f"{' '.join(case)} {count}"
        if name not in results:
            results[name] = measure(*case, count)
            output.replace(file, json.dumps(results, indent=2))
        found = results[name]
        verdict = "fits" if found["fits"] else "out of memory"
        print(f"{name}: {found['total_bytes'] / GIB:.2f} GiB, {verdict}", flush=True)
        return bool(found["fits"])

    cases = list(itertools.product(LAYERS_AND_WIDTH, OPTIMIZERS))
    for case in cases:
        fits(case, PLANNED[0])
    for case in cases:
        next(count for count in SLICES if fits(case, count))
    for i, count in enumerate(PLANNED):
        for case in cases:
            fits(case, count)
        write_table(results, PLANNED[: i + 1])


if __name__ == "__main__":
    main()

"""What does orthogonalisation cost where matrices are sharded?

Compiles Newton and Schulz's iteration of the hidden matrices of a Llama of a billion
parameters (Llama 3.2's shapes) for 16 v5e or 8 H100s that need not be there: ours,
which stacks matrices and lays the stack over the devices, and `optax.contrib`'s, which
leaves it to XLA's partitioner. Theirs is compiled for two layers, and counted eight
times. It also says what share of a training step of half a million tokens the
iteration's FLOPs are. TPUs need the `tpu` extra, H100s JAX's CUDA plugin. Chips of one
kind a run:

    python benchmarks/muon_sharded.py --chip v5e
"""

import argparse
import math
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from measuring import output
from measuring.chips import target
from measuring.examples import collectives
from measuring.examples import hlo as hlo_text

from came_optax import orthogonalize

CHIPS = {"v5e": "v5e:4x4", "h100": "h100:8"}
MESHES = {
    "v5e": {"FSDP": {"fsdp": 16}, "FSDP × TP": {"fsdp": 4, "tensor": 4}},
    "h100": {"FSDP": {"fsdp": 8}, "FSDP × TP": {"fsdp": 4, "tensor": 2}},
}
LLAMA = {
    "q": (2048, 2048),
    "k": (2048, 512),
    "v": (2048, 512),
    "o": (2048, 2048),
    "gate": (2048, 8192),
    "up": (2048, 8192),
    "down": (8192, 2048),
}
GPT2 = {"attn": (768, 2304), "proj": (768, 768), "fc": (768, 3072), "out": (3072, 768)}
ROW_PARALLEL = ("o", "down")  # What tensor parallelism splits by rows.
TOKENS = 2**19
# Of dots, and of cuBLAS's.
CONTRACTED = re.compile(r'lhs_contracting_dim(?:s=\{|ensions":\[)(.*?)[}\]]')
# Layer, number of layers, parameters.
MODELS = {
    "GPT-2 small": (GPT2, 12, 124_439_808),
    "Llama 1 B": (LLAMA, 16, 1_235_814_400),
}


def useful_flops(layer: dict[str, tuple[int, int]], layers: int) -> int:
    """Returns the FLOPs of five steps one by one, of each matrix once."""
    sides = map(sorted, layer.values())
    return layers * sum(5 * (4 * m * m * n + 2 * m**3) for m, n in sides)


def our_flops(layer: dict[str, tuple[int, int]], layers: int) -> int:
    """Returns the FLOPs where two steps of wide matrices share a Gram matrix."""
    sides = map(sorted, layer.values())
    return layers * sum(
        (12 * n + 22 * m if 2 * n > 3 * m else 20 * n + 10 * m) * m * m
        for m, n in sides
    )


def ours(shardings: Any) -> optax.GradientTransformation:
    return orthogonalize(dtype=jnp.bfloat16, params_sharding=shardings)


def theirs(shardings: Any) -> optax.GradientTransformation:
    """Optax's, in bfloat16, with no momentum."""
    del shardings
    tx = optax.contrib.scale_by_muon(
        beta=0.0,
        nesterov=False,
        weight_dimension_numbers=lambda params: jax.tree.map(
            lambda _: optax.contrib.MuonDimensionNumbers(), params
        ),
    )

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        del params
        narrow = jax.tree.map(lambda u: u.astype(jnp.bfloat16), updates)
        new, _ = tx.update(narrow, tx.init(narrow))
        return jax.tree.map(lambda u: u.astype(jnp.float32), new), state

    return optax.GradientTransformation(lambda _: optax.EmptyState(), update)


def product_flops(hlo: str) -> int:
    """Returns the FLOPs of the matrix products in an optimised HLO module.

    XLA's own count has nothing for the libraries that GPUs call.
    """
    flops, results = 0, {}
    for line in hlo.splitlines():
        if not hlo_text.NAME.match(line):
            continue
        one = hlo_text.instruction(line)
        results[one.name] = shape = _first_shape(one.result)
        if contracted := CONTRACTED.search(line):
            axes = re.findall(r"\d+", contracted[1])
            operand = results[one.operands[0]]
            flops += 2 * math.prod(shape) * math.prod(operand[int(a)] for a in axes)
    return flops


def _first_shape(types: str) -> tuple[int, ...]:
    found = hlo_text.ARRAY.search(types)
    return tuple(map(int, re.findall(r"\d+", found[2]))) if found else ()


def compile_update(
    make: Callable[[Any], optax.GradientTransformation], mesh: Mesh, layers: int
) -> dict[str, Any]:
    """Compiles an update for a mesh, and returns what it takes of each device."""

    def spec(name: str) -> P:
        if "tensor" not in mesh.axis_names:
            return P("fsdp")
        return P("tensor", "fsdp") if name in ROW_PARALLEL else P("fsdp", "tensor")

    updates = [
        {
            name: jax.ShapeDtypeStruct(
                shape, jnp.float32, sharding=NamedSharding(mesh, spec(name))
            )
            for name, shape in LLAMA.items()
        }
    ] * layers
    shardings = jax.tree.map(lambda x: x.sharding, updates)
    tx = make(shardings)
    step = jax.jit(
        lambda updates: tx.update(updates, optax.EmptyState())[0],
        out_shardings=shardings,
    )
    compiled: Any = step.lower(updates).compile()
    scale = MODELS["Llama 1 B"][1] // layers
    hlo, analysis = compiled.as_text(), compiled.cost_analysis()
    found = collectives(hlo)
    flops = mesh.size * (analysis["flops"] if analysis else product_flops(hlo))
    return {
        "FLOPs / useful FLOPs": round(flops / useful_flops(LLAMA, layers), 2),
        "collectives": scale * sum(c.times for c in found),
        "kinds": ", ".join(sorted({c.kind for c in found})),
        "received per device (MB)": round(scale * sum(c.bytes for c in found) / 1e6),
        "temporaries (MB)": round(compiled.memory_analysis().temp_size_in_bytes / 1e6),
    }


def rows(chip: str, layers: int) -> Iterator[dict[str, Any]]:
    devices = np.array(target(CHIPS[chip]).devices)
    for name, sizes in MESHES[chip].items():
        mesh = Mesh(
            devices.reshape(tuple(sizes.values())),
            tuple(sizes),
            axis_types=(AxisType.Auto,) * len(sizes),
        )
        of_each = (("orthogonalize", ours, layers), ("optax.contrib", theirs, 2))
        for optimizer, make, compiled_layers in of_each:
            row = {f"{devices.size} {chip}": name, "by": optimizer}
            row |= compile_update(make, mesh, compiled_layers)
            print(row, flush=True)
            yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chip", choices=CHIPS, default="v5e")
    parser.add_argument("--output", type=pathlib.Path, default=output.DEFAULT)
    args = parser.parse_args()

    layers = MODELS["Llama 1 B"][1]
    output.write(
        args.output,
        f"muon_sharded_{args.chip}",
        list(rows(args.chip, layers)),
        layers=layers,
        layers_compiled={"orthogonalize": layers, "optax.contrib": 2},
        jax=jax.__version__,
    )
    shares = []
    for model, (layer, number, parameters) in MODELS.items():
        flops, step = our_flops(layer, number), 6 * parameters * TOKENS
        shares.append(
            {
                "model": model,
                "iteration (TFLOP)": round(flops / 1e12, 2),
                "training step (TFLOP)": round(step / 1e12),
                "share": f"{flops / step:.1%}",
            }
        )
    output.write(args.output, "muon_share", shares, tokens=TOKENS)


if __name__ == "__main__":
    main()

"""How large a GPT-2 trains on one chip, by optimizer?

Searches for the largest whose whole training step (one sequence of 1024 tokens, layers
scanned and recomputed in the backward pass) the compiler can place in the memory of a
chip that need not be there. Compiled before is not compiled again: delete lines of
docs/results/memory/largest.json to do so. TPUs need the `tpu` extra, the H100 JAX's
CUDA plugin. One chip a run:

    python benchmarks/largest_model.py --chip v5e
"""

import argparse
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.pyplot as plt
from flax import nnx
from matplotlib.figure import Figure
from measuring import ROOT
from measuring.compiled_steps import (
    CHIPS,
    MASTER_WEIGHTS,
    OPTIMIZERS,
    Results,
    compile_step,
    one_chip,
)
from measuring.examples import (
    Target,
    Task,
    blank,
    gpt2,
    next_token_loss,
    of_columns,
    with_param_dtype,
)
from measuring.zoo import gpt2_shapes

from came_optax import state_memory

FOLDER = ROOT / "docs" / "results" / "memory"
PARAM_DTYPES = ("float32", "bfloat16")


class Layers(nnx.Module):
    """All layers of a GPT-2: stacked, scanned, and recomputed in the backward pass."""

    def __init__(self, config: gpt2.GPT2Config, rngs: nnx.Rngs):
        make = nnx.vmap(lambda rngs: gpt2.Block(config, rngs=rngs))
        self.stack = make(rngs.split(config.n_layer))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies one layer after the other."""
        apply = nnx.remat(lambda block, x: block(x))
        return nnx.scan(apply, in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(
            self.stack, x
        )


def config_of(layers: int) -> gpt2.GPT2Config:
    """Returns a GPT-2 about as deep for its width as GPT-2 XL: 32 wide a layer."""
    heads = max(layers // 2, 1)
    return gpt2.GPT2Config(
        n_layer=layers, n_head=heads, n_embd=64 * heads, dtype=jnp.bfloat16
    )


def num_params(layers: int) -> int:
    """Returns the size of the matrices, nearly all of the model."""
    config = config_of(layers)
    tokens = config.vocab_size + config.n_positions
    return 12 * layers * config.n_embd**2 + tokens * config.n_embd


def largest(
    measure: Callable[[int], Mapping[str, Any]], guess: int, available: int
) -> int:
    """Returns the largest number of layers whose step fits.

    Args:
        measure: From a number of layers to "bytes" and "fits".
        guess: The number of layers to begin with.
        available: The chip's memory, in bytes.
    """
    fits, exceeds = 1, 1000
    while exceeds - fits > 1:
        layers = min(max(guess, fits + 1), exceeds - 1)
        found = measure(layers)
        fits, exceeds = (layers, exceeds) if found["fits"] else (fits, layers)
        guess = layers_of(num_params(layers) * available / found["bytes"])
    return fits


def layers_of(parameters: float) -> int:
    """Returns the layers of the largest model with at most so many parameters."""
    return next(n for n in range(1000) if num_params(n + 1) > parameters)


def find_largest(
    results: Results, chip: str, optimizer: str, dtype: str, target: Target
) -> int:
    """Returns the layers of the largest GPT-2 that trains on a chip."""

    def measure(layers: int) -> Any:
        task = make_task(config_of(layers))
        task = with_param_dtype(task, dtype)
        make = functools.partial(compile_step, task, optimizer, target)
        return results.get(chip, optimizer, dtype, layers, make=make)

    xl = gpt2_shapes("xl")
    state = state_memory(OPTIMIZERS[optimizer](), xl).bytes_per_param
    # Parameters, gradients, state, and some for activations and temporaries.
    needed = 2 * jnp.dtype(dtype).itemsize + state + 1
    return largest(measure, layers_of(target.hbm / needed), target.hbm)


def make_task(config: gpt2.GPT2Config) -> Task:
    """Returns a task whose layers are stacked, without data."""

    def make_model(rngs: nnx.Rngs) -> gpt2.GPT2:
        model = gpt2.GPT2(dataclasses.replace(config, n_layer=0), rngs=rngs)
        model.h.append(Layers(config, rngs))  # type: ignore[arg-type]
        return model

    records, length = blank(config.n_positions), config.n_positions
    return Task("GPT-2", make_model, next_token_loss, records, records, length)


def found_largest(results: Results) -> dict[tuple[str, str, str], tuple[int, Any]]:
    """Returns layers and step of the largest that fits, where the next was refused."""
    of_case: dict[tuple[str, str, str], dict[int, Any]] = {}
    for (chip, optimizer, dtype, layers), step in results.items():
        of_case.setdefault((chip, dtype, optimizer), {})[int(layers)] = step
    return {
        case: (layers, step)
        for case, steps in of_case.items()
        for layers, step in steps.items()
        if step["fits"] and layers + 1 in steps and not steps[layers + 1]["fits"]
    }


def make_table(found: Mapping[tuple[str, str, str], tuple[int, Any]]) -> str:
    known = {case[:2] for case in found}
    columns = [(c, d) for c in CHIPS for d in PARAM_DTYPES if (c, d) in known]

    def cell(*case: Any) -> str:
        if case not in found:
            return ""
        layers, step = found[case]
        return f"{step['parameters'] / 1e9:.2f} ({layers} × {config_of(layers).n_embd})"

    return of_columns(
        [
            {"billions of parameters (layers × width)": name}
            | {
                f"one {chip}, {dtype}": cell(chip, dtype, name)
                for chip, dtype in columns
            }
            for name in OPTIMIZERS
        ]
    )


def draw(found: Mapping[tuple[str, str, str], tuple[int, Any]]) -> Figure:
    """Draws the largest models' sizes, a panel a chip."""
    chips = [chip for chip in CHIPS if any(case[0] == chip for case in found)]
    figure, panels = plt.subplots(
        1, len(chips), figsize=(9, 4), sharey=True, squeeze=False, layout="constrained"
    )
    styles = [{"color": "0.6"}, {"color": "white", "hatch": "///"}]
    for chip, axes in zip(chips, panels[0], strict=True):
        for i, (dtype, style) in enumerate(zip(PARAM_DTYPES, styles, strict=True)):
            sizes = {
                y + 0.4 * i - 0.2: found[chip, dtype, name][1]["parameters"] / 1e9
                for y, name in enumerate(OPTIMIZERS)
                if (chip, dtype, name) in found
            }
            label = f"{dtype} parameters"
            bars = axes.barh(
                list(sizes), sizes.values(), 0.36, edgecolor="0", label=label, **style
            )
            axes.bar_label(bars, fmt="%.2f", padding=2)
        axes.set_title(f"largest GPT-2 that trains on one {chip}")
        axes.set_xlabel("parameters (billions)")
        axes.margins(x=0.15)
    panels[0][0].set_yticks(range(len(OPTIMIZERS)), list(OPTIMIZERS))
    panels[0][0].invert_yaxis()
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside upper center")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chip", choices=CHIPS, default="v5e")
    parser.add_argument(
        "--param-dtypes", nargs="+", choices=PARAM_DTYPES, default=PARAM_DTYPES
    )
    parser.add_argument(
        "--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS)
    )
    parser.add_argument("--output", type=pathlib.Path, default=FOLDER)
    args = parser.parse_args()

    target, results = one_chip(args.chip), Results(args.output / "largest.json")
    for dtype in args.param_dtypes:
        for name in args.optimizers:
            if name in MASTER_WEIGHTS and dtype == "float32":
                continue
            find_largest(results, args.chip, name, dtype, target)
    found = found_largest(results)
    text = make_table(found)
    print(text)
    (args.output / "largest.md").write_text(text + "\n", encoding="utf-8")
    matplotlib.use("Agg")
    draw(found).savefig(args.output / "largest.png", dpi=150)


if __name__ == "__main__":
    main()

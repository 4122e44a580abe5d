r"""How much memory does training take, and how large a model fits, by optimizer?

Counts the optimizers' states; compiles whole training steps, parameters and state
donated, for one chip that need not be there; and searches for the largest GPT-2 whose
step the compiler can place in the chip's memory. Compiled before is not compiled again:
delete lines of docs/results/memory/compiled.json to do so. TPUs need the `tpu` extra,
the H100 JAX's CUDA plugin. One chip a run:

    python benchmarks/memory.py --chip v5e
"""

import argparse
import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.pyplot as plt
import optax
from flax import nnx
from measuring import ROOT, output, updates

from came_optax import memory, state_memory
from compile_for import make_task
from pretraining import ahead_of_time, devices, topologies
from pretraining.errors import UserError
from pretraining.models import gpt2
from pretraining.task import Task, with_param_dtype

FOLDER = ROOT / "docs" / "results" / "memory"
CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "h100": "h100:1"}
OPTIMIZERS = {k: make for k, make in updates.OPTIMIZERS.items() if k != "Adafactor"}
PARAM_DTYPES = ("float32", "bfloat16")
STEPS = {"bert-large": ("bert", "large"), "gpt2-medium": ("gpt2", "medium")}
# Luo et al., tables 2 and 3 and section 5, as printed: on GPUs, batches not given.
PAPER_STATE = {"AdamW": 30.6, "Adafactor, momentum": 15.9, "CAME, float32": 16.3}
PAPER_STEP = {
    "bert-large": {"AdamW": 8.24, "Adafactor, momentum": 7.00, "CAME, float32": 7.07},
    "gpt2-medium": {"AdamW": 8.77, "CAME, float32": 7.44},
}
GB = 10**9


def in_float32(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Keeps the state in float32 whatever the parameters are, as CAME does.

    Optax's optimizers have moments in the parameters' dtype; in bfloat16 a second
    moment with a decay rate of 0.999 hardly moves.
    """

    def widen(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    def update(grads: Any, state: Any, params: Any = None) -> Any:
        new, state = tx.update(widen(grads), state, widen(params))
        return jax.tree.map(lambda u, p: u.astype(p.dtype), new, params), state

    return optax.GradientTransformation(lambda params: tx.init(widen(params)), update)


class Layers(nnx.Module):
    """All layers of a GPT-2: stacked, scanned, and recomputed in the backward pass."""

    def __init__(self, config: gpt2.GPT2Config, rngs: nnx.Rngs):
        make = nnx.vmap(lambda rngs: gpt2.Block(config, rngs=rngs))
        self.stack = make(rngs.fork(split=config.n_layer))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies one layer after the other."""
        apply = nnx.remat(lambda block, x: block(x))
        return nnx.scan(apply, in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(
            self.stack, x
        )


def gpt2_of(layers: int) -> gpt2.GPT2Config:
    """Returns a GPT-2 about as deep for its width as GPT-2 XL: 32 wide a layer."""
    heads = layers // 2
    return gpt2.GPT2Config(
        n_layer=layers, n_head=heads, n_embd=64 * heads, dtype=jnp.bfloat16
    )


def num_params(config: gpt2.GPT2Config) -> int:
    """Returns the size of the matrices, nearly all of the model."""
    width = config.n_embd
    tokens = config.vocab_size + config.n_positions
    return 12 * config.n_layer * width**2 + tokens * width


def gpt2_task(config: gpt2.GPT2Config) -> tuple[Task, dict[str, jax.ShapeDtypeStruct]]:
    """Returns a task whose layers are stacked, and the shapes of its records."""

    def make_model(rngs: nnx.Rngs) -> gpt2.GPT2:
        model = gpt2.GPT2(dataclasses.replace(config, n_layer=0), rngs=rngs)
        model.h.append(Layers(config, rngs))
        return model

    record = {
        "tokens": jax.ShapeDtypeStruct((config.n_positions + 1,), jnp.int32),
        "weight": jax.ShapeDtypeStruct((), jnp.float32),
    }
    loss, length = gpt2.next_token_loss, config.n_positions
    return Task("GPT-2", make_model, loss, (), (), tokens_per_record=length), record


def compile_step(
    task: Task, record: Any, name: str, target: topologies.Target
) -> dict[str, Any]:
    """Returns what one chip needs for the training step of one sequence."""
    tx, mesh = in_float32(OPTIMIZERS[name]()), devices.make_mesh({}, target.devices)
    report = ahead_of_time.compile_train_step(
        task, tx, record, target, mesh, batch_size=1
    )
    return {
        "parameters": report.parameters,
        "bytes": report.total,
        "fits": report.fits,
        "by kind": dict(report.memory),
        "seconds": round(report.seconds, 1),
    }


def largest(
    measure: Callable[[int], Mapping[str, Any]],
    size: Callable[[int], int],
    guess: int,
    available: int,
) -> int:
    """Returns the largest number of layers whose step fits in a chip's memory.

    Args:
        measure: From a number of layers to "bytes" and "fits".
        size: From a number of layers to that of parameters.
        guess: The number of layers to begin with.
        available: The chip's memory, in bytes.
    """
    low, high = 1, 1000  # Fits, doesn't fit.
    while high - low > 1:
        layers = min(max(guess, low + 1), high - 1)
        found = measure(layers)
        low, high = (layers, high) if found["fits"] else (low, layers)
        fitting = size(layers) * available / found["bytes"]
        guess = next(n for n in range(1000) if size(n + 1) > fitting)
    return low


class Compiled:
    """Compiled steps, on disk."""

    def __init__(self) -> None:
        self.path = FOLDER / "compiled.json"
        self.steps: dict[str, Any] = {}
        if self.path.exists():
            self.steps = json.loads(self.path.read_text(encoding="utf-8"))

    def get(self, key: Sequence[Any], compile: Callable[[], Any]) -> Any:
        """Returns what was stored under a key, compiling if nothing was."""
        name = " | ".join(map(str, key))
        if name not in self.steps:
            self.steps[name] = compile()
            print(name, self.steps[name], flush=True)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lines = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in self.steps.items()]
            self.path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
        return self.steps[name]


def find_largest(
    compiled: Compiled, chip: str, name: str, dtype: str, target: topologies.Target
) -> int:
    """Returns the layers of the largest GPT-2 that fits."""

    def measure(layers: int) -> Any:
        task, record = gpt2_task(gpt2_of(layers))
        task = with_param_dtype(task, dtype)
        return compiled.get(
            ("largest", chip, name, dtype, layers),
            functools.partial(compile_step, task, record, name, target),
        )

    def size(layers: int) -> int:
        return num_params(gpt2_of(layers))

    params = memory.abstract_params("gpt2-xl")
    state = state_memory(OPTIMIZERS[name](), params).bytes_per_param
    # Parameters, gradients, state, and some for activations and temporaries.
    fitting = target.hbm / (2 * jnp.dtype(dtype).itemsize + state + 1)
    guess = next(n for n in range(1000) if size(n + 1) > fitting)
    return largest(measure, size, guess, target.hbm)


def state_rows() -> list[dict[str, Any]]:
    models = ("bert-large", "bert-4b", "gpt2-medium")
    shapes = {model: memory.abstract_params(model) for model in models}
    return [
        {"state (GB)": name}
        | {
            model: f"{state_memory(make(), params).total / GB:.3f}"
            for model, params in shapes.items()
        }
        | {"bert-4b, paper": PAPER_STATE.get(name, "")}
        for name, make in OPTIMIZERS.items()
        if name != "SGD"
    ]


def step_rows(compiled: Compiled, model: str) -> list[dict[str, Any]]:
    def cell(chip: str, name: str) -> str:
        found = compiled.steps.get(f"step | {chip} | {name} | {model}")
        return f"{found['bytes'] / topologies.GIB:.2f}" if found else ""

    return [
        {f"{model} (GiB)": name}
        | {chip: cell(chip, name) for chip in CHIPS}
        | {"paper": PAPER_STEP[model].get(name, "")}
        for name in OPTIMIZERS
    ]


def largest_steps(compiled: Compiled) -> dict[tuple[str, str, str], tuple[int, Any]]:
    """Returns layers and step of the largest that fits of what was compiled."""
    found: dict[tuple[str, str, str], tuple[int, Any]] = {}
    for key, step in compiled.steps.items():
        kind, chip, name, *rest = key.split(" | ")
        if kind == "largest" and step["fits"]:
            dtype, layers = rest
            fits = int(layers), step
            case = chip, dtype, name
            found[case] = max(found.get(case, fits), fits, key=lambda x: x[0])
    return found


def largest_rows(compiled: Compiled) -> list[dict[str, Any]]:
    found = largest_steps(compiled)

    def cell(*case: str) -> str:
        if case not in found:
            return ""
        layers, step = found[case]
        return f"{step['parameters'] / GB:.2f} B ({layers} × {gpt2_of(layers).n_embd})"

    return [
        {"largest GPT-2": name}
        | {f"{c}, {d} parameters": cell(c, d, name) for c, d in _cases(found)}
        for name in OPTIMIZERS
    ]


def draw_largest(compiled: Compiled) -> None:
    """Draws bars of the largest models' sizes, a panel a chip."""
    found = largest_steps(compiled)
    chips = list(dict.fromkeys(chip for chip, _ in _cases(found)))
    matplotlib.use("Agg")
    figure, panels = plt.subplots(
        1, len(chips), figsize=(9, 4), sharey=True, squeeze=False, layout="constrained"
    )
    for chip, axes in zip(chips, panels[0], strict=True):
        for i, (dtype, hatch) in enumerate(zip(PARAM_DTYPES, ("", "///"), strict=True)):
            sizes = [
                found[chip, dtype, name][1]["parameters"] / GB
                if (chip, dtype, name) in found
                else 0
                for name in OPTIMIZERS
            ]
            bars = axes.barh(
                [y + 0.4 * i - 0.2 for y in range(len(sizes))],
                sizes,
                height=0.36,
                color=("0.55", "white")[i],
                edgecolor="black",
                hatch=hatch,
                label=f"{dtype} parameters",
            )
            axes.bar_label(bars, [f"{x:.2f}" if x else "" for x in sizes], padding=2)
        axes.set_title(f"one {chip}")
        axes.set_xlabel("parameters of the largest GPT-2 that trains (billions)")
        axes.margins(x=0.15)
    panels[0][0].set_yticks(range(len(OPTIMIZERS)), list(OPTIMIZERS))
    panels[0][0].invert_yaxis()
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside upper center")
    figure.savefig(FOLDER / "largest.png", dpi=150)
    plt.close(figure)


def _cases(found: Mapping[tuple[str, str, str], Any]) -> list[tuple[str, str]]:
    known = {case[:2] for case in found}
    return [(c, d) for c in CHIPS for d in PARAM_DTYPES if (c, d) in known]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chip", choices=CHIPS, default="v5e")
    parser.add_argument("--models", nargs="*", choices=STEPS, default=list(STEPS))
    parser.add_argument(
        "--param-dtypes", nargs="*", choices=PARAM_DTYPES, default=PARAM_DTYPES
    )
    parser.add_argument("--optimizers", nargs="+", default=list(OPTIMIZERS))
    args = parser.parse_args()

    try:
        target = topologies.target(CHIPS[args.chip])
    except UserError as error:
        sys.exit(str(error))
    target = dataclasses.replace(target, devices=target.devices[:1])
    compiled = Compiled()
    for dtype in args.param_dtypes:
        for name in args.optimizers:
            find_largest(compiled, args.chip, name, dtype, target)
    for model in args.models:
        task, record = make_task(*STEPS[model])
        for name in args.optimizers:
            compiled.get(
                ("step", args.chip, name, model),
                functools.partial(compile_step, task, record, name, target),
            )

    tables = {"state": state_rows(), "largest": largest_rows(compiled)}
    tables |= {f"step-{model}": step_rows(compiled, model) for model in STEPS}
    for name, rows in tables.items():
        text = output.table(rows)
        print(f"\n{text}")
        (FOLDER / f"{name}.md").write_text(text + "\n", encoding="utf-8")
    draw_largest(compiled)


if __name__ == "__main__":
    main()

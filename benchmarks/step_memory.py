"""What memory does a whole training step of the paper's models take, by optimizer?

Compiles the examples' training steps (one sequence, parameters and state donated) for a
chip that need not be there. Compiled before is not compiled again: delete lines of
docs/results/memory/steps.json to do so. TPUs need the `tpu` extra, the H100 JAX's CUDA
plugin. One chip a run:

    python benchmarks/step_memory.py --chip v5e
"""

import argparse
import functools
import pathlib
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from measuring import ROOT, output
from measuring.compiled_steps import (
    CHIPS,
    MASTER_WEIGHTS,
    OPTIMIZERS,
    Results,
    compile_step,
    one_chip,
)
from measuring.examples import GIB, make_task

FOLDER = ROOT / "docs" / "results" / "memory"
STEPS = {"bert-large": ("bert", "large"), "gpt2-medium": ("gpt2", "medium")}
NAMES = [name for name in OPTIMIZERS if name not in MASTER_WEIGHTS]
# Luo et al., 2023, as printed, on a GPU: GB of BERT-Large, the batch not given; GiB of
# GPT-2 medium at batch 1.
PAPER_STEPS = {
    "bert-large": {"AdamW": 8.24, "Adafactor, momentum": 7.00, "came, float32": 7.07},
    "gpt2-medium": {"AdamW": 8.77, "came, float32": 7.44},
}


def step_table(results: Results) -> str:
    def cell(*key: str) -> str:
        step = results.find(*key)
        return f"{step['bytes'] / GIB:.2f}" if step else ""

    def row(name: str) -> dict[str, Any]:
        cells = {"training step (GiB)": name}
        for model, paper in PAPER_STEPS.items():
            cells |= {f"{model}, {c}": cell(c, model, name) for c in CHIPS}
            cells[f"{model}, paper"] = str(paper.get(name, ""))
        return cells

    rows = [row(name) for name in NAMES]
    empty = [key for key in rows[0] if not any(r[key] for r in rows)]
    return output.table([{k: v for k, v in r.items() if k not in empty} for r in rows])


def draw(results: Results) -> Figure:
    """Draws the memory of the training steps, a panel a model."""
    figure, panels = plt.subplots(
        1, len(STEPS), figsize=(9, 5), sharey=True, layout="constrained"
    )
    styles = [
        {"color": "0.6"},
        {"color": "white", "hatch": "///"},
        {"color": "white", "hatch": "..."},
    ]
    for model, axes in zip(STEPS, panels, strict=True):
        for i, (chip, style) in enumerate(zip(CHIPS, styles, strict=True)):
            gib = {
                y + 0.27 * (i - 1): step["bytes"] / GIB
                for y, name in enumerate(NAMES)
                if (step := results.find(chip, model, name))
            }
            axes.barh(list(gib), gib.values(), 0.24, edgecolor="0", label=chip, **style)
        paper = {
            y: PAPER_STEPS[model][name]
            for y, name in enumerate(NAMES)
            if name in PAPER_STEPS[model]
        }
        axes.plot(
            list(paper.values()), list(paper), "kD", label="paper, on GPUs (as printed)"
        )
        axes.set_title(model)
        axes.set_xlabel("memory of a training step (GiB)")
    panels[0].set_yticks(range(len(NAMES)), NAMES)
    panels[0].invert_yaxis()
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=4
    )
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chip", choices=CHIPS, default="v5e")
    parser.add_argument("--models", nargs="+", choices=STEPS, default=STEPS)
    parser.add_argument("--optimizers", nargs="+", default=NAMES)
    parser.add_argument("--output", type=pathlib.Path, default=FOLDER)
    args = parser.parse_args()

    target, results = one_chip(args.chip), Results(args.output / "steps.json")
    for model in args.models:
        task = make_task(*STEPS[model])
        for name in args.optimizers:
            make = functools.partial(compile_step, task, name, target)
            results.get(args.chip, model, name, make=make)
    text = step_table(results)
    print(f"\n{text}")
    (args.output / "steps.md").write_text(text + "\n", encoding="utf-8")
    matplotlib.use("Agg")
    draw(results).savefig(args.output / "steps.png", dpi=150)


if __name__ == "__main__":
    main()

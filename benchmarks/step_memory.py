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

from measuring import ROOT
from measuring.compiled_steps import (
    CHIPS,
    MASTER_WEIGHTS,
    OPTIMIZERS,
    Results,
    compile_step,
    one_chip,
)
from measuring.examples import GIB, make_task, of_columns

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
    return of_columns([{k: v for k, v in r.items() if k not in empty} for r in rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chip", choices=CHIPS, default="v5e")
    parser.add_argument("--models", nargs="+", choices=STEPS, default=STEPS)
    parser.add_argument("--optimizers", nargs="+", choices=NAMES, default=NAMES)
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


if __name__ == "__main__":
    main()

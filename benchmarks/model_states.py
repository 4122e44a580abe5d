"""What do the optimizers' states take for well-known models?

    python benchmarks/model_states.py                   # All of them, a table.
    python benchmarks/model_states.py --model llama-8b --optimizer steady-came-int8

Nothing is allocated: a model here is the shapes of its parameters.
"""

import argparse
import collections
import math
from collections.abc import Callable, Iterable
from functools import partial

import jax
import optax
from measuring.examples import format_table
from measuring.zoo import MODELS, abstract_params

from came_optax import state_memory, steady_came

OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    # A state of `came` takes the same.
    "steady-came": partial(steady_came, 1e-3),
    "steady-came-bfloat16": partial(steady_came, 1e-3, mu_dtype="bfloat16"),
    "steady-came-int8": partial(steady_came, 1e-3, mu_dtype="int8"),
    "steady-came-int4": partial(steady_came, 1e-3, mu_dtype="int4"),
    "adamw": partial(optax.adamw, 1e-3),
    "adafactor": partial(optax.adafactor, 1e-3, momentum=0.9),
    "adafactor-no-momentum": partial(optax.adafactor, 1e-3),
}


_COLUMNS = {
    "steady_came": ("steady-came", "bfloat16"),
    "bfloat16": ("steady-came-bfloat16", "bfloat16"),
    "int8": ("steady-came-int8", "bfloat16"),
    "int4": ("steady-came-int4", "bfloat16"),
    "AdamW, float32 parameters": ("adamw", "float32"),
    "AdamW, bfloat16 parameters": ("adamw", "bfloat16"),
    "Adafactor, momentum": ("adafactor", "bfloat16"),
    "Adafactor": ("adafactor-no-momentum", "bfloat16"),
}


def table(models: Iterable[str] = MODELS) -> str:
    """Returns a Markdown table of the states' bytes.

    Those of `steady_came` are the same for parameters of both dtypes.
    """
    rows = [["state (10⁹ bytes)", "parameters (10⁹)", *_COLUMNS]]
    for model in models:
        size = sum(math.prod(p.shape) for p in jax.tree.leaves(abstract_params(model)))
        sizes = [size]
        for optimizer, dtype in _COLUMNS.values():
            sizes.append(state_bytes(model, optimizer, dtype))
        rows.append([model, *map(_billions, sizes)])
    return format_table(rows, markdown=True)


def _billions(number: int) -> str:
    """Returns the first three digits of a number, in billions."""
    return f"{number / 1e9:#.3g}".rstrip(".")


def state_bytes(model: str, optimizer: str, dtype: str) -> int:
    """Returns the bytes of a state, tracing one leaf of each shape."""
    leaves = jax.tree.leaves(abstract_params(model, dtype))
    counts = collections.Counter(str(leaf.shape) for leaf in leaves)
    one_of_each = {str(leaf.shape): leaf for leaf in leaves}
    by_leaf = state_memory(OPTIMIZERS[optimizer](), one_of_each).by_leaf
    return sum(counts.get(name, 1) * size for name, size in by_leaf.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, help="default: a table of all")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="steady-came")
    parser.add_argument(
        "--param-dtype", choices=["float32", "bfloat16"], default="float32"
    )
    args = parser.parse_args()
    if args.model is None:
        print(table())
    else:
        params = abstract_params(args.model, args.param_dtype)
        print(state_memory(OPTIMIZERS[args.optimizer](), params))


if __name__ == "__main__":
    main()

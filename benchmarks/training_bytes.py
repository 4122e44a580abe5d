"""How many bytes does a parameter cost in training, and what are they for?

    python benchmarks/training_bytes.py

Counts GPT-2 XL's, with nothing allocated, into docs/results/memory/training.md.
"""

import collections
from typing import Any

import flashoptim_jax
import jax
import optax
from measuring import ROOT
from measuring.examples import of_columns
from measuring.zoo import gpt2_shapes

from came_optax import came_muon, steady_came, with_master_weights

COLUMNS = ("weight", "remainder", "momentum", "statistics", "gradient")
ADAMW, INT8 = optax.adamw(1e-3), steady_came(1e-3, mu_dtype="int8")
ROWS = {
    "steady_came, int8, 24-bit weights": (with_master_weights(INT8, 24), "bfloat16"),
    "steady_came, int8, 16-bit weights": (with_master_weights(INT8, 16), "bfloat16"),
    "steady_came, int8, 32-bit weights": (with_master_weights(INT8, 32), "bfloat16"),
    "steady_came, float32": (steady_came(1e-3), "float32"),
    "AdamW, float32": (ADAMW, "float32"),
    "AdamW, bfloat16, which loses steps": (ADAMW, "bfloat16"),
    "AdamW, 24-bit weights": (with_master_weights(ADAMW, 24), "bfloat16"),
    "came_muon, int8, 24-bit weights": (
        with_master_weights(came_muon(1e-3), 24),
        "bfloat16",
    ),
    "flashoptim's AdamW, 24-bit weights": (flashoptim_jax.flash_adamw(), "bfloat16"),
}
# Of the state; what is not named here is a statistic.
KINDS = {"remainder": "remainder", "ecc": "remainder", "mu": "momentum"}


def count(tx: Any, params: Any) -> dict[str, float]:
    """Returns the bytes of each kind for each parameter."""
    bytes_: collections.Counter[str] = collections.Counter()
    state = jax.eval_shape(tx.init, params)
    for path, x in jax.tree.leaves_with_path(state):
        names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        kind = next((KINDS[name] for name in names if name in KINDS), "statistics")
        bytes_[kind] += x.size * x.dtype.itemsize
    for p in jax.tree.leaves(params):
        for kind in ("weight", "gradient"):
            bytes_[kind] += p.size * p.dtype.itemsize
    number = sum(p.size for p in jax.tree.leaves(params))
    return {kind: bytes_[kind] / number for kind in COLUMNS}


def main() -> None:
    rows = []
    xl = gpt2_shapes("xl")
    for name, (tx, dtype) in ROWS.items():
        bytes_ = count(tx, jax.tree.map(lambda p, d=dtype: p.update(dtype=d), xl))
        everything = sum(bytes_.values())
        bytes_["all but gradients"] = everything - bytes_["gradient"]
        bytes_["all"] = everything
        cells = {kind: f"{number:.2f}" for kind, number in bytes_.items()}
        rows.append({"bytes a parameter": name} | cells)
    table = of_columns(rows)
    path = ROOT / "docs" / "results" / "memory" / "training.md"
    path.write_text(table + "\n", encoding="utf-8")
    print(table)


if __name__ == "__main__":
    main()

"""Which 8-bit or 4-bit code loses least of the momentum?

Trains the examples' nano GPT-2 with CAME, measures what each code makes of its final
momentum, and trains anew with momentum rounded to some of the codes after every step:
final losses are compared with those of float32 momentum, seed by seed. The update of a
step uses the momentum before it is rounded, as `came` does. What was trained before is
not trained again: delete its lines in runs.json to do so.

    python benchmarks/momentum_codes.py
"""

import argparse
import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from measuring import ROOT, output

from pretrain_gpt2 import ModelOptions, make_task
from pretraining.data import corpus, pipeline
from pretraining.task import Task
from pretraining.training.optimizers import (
    OptimizerOptions,
    make_optimizer,
    make_schedule,
)
from pretraining.training.step import merge

FOLDER = ROOT / "docs" / "results" / "momentum-codes"
STEPS, BATCH_SIZE, VALIDATION_BATCHES = 300, 8, 48
# steady_came as it was when the results in FOLDER were made.
OPTIMIZER = OptimizerOptions(optimizer="came", learning_rate=3e-3, nesterov=False)
MIN_SIZE = 4096  # Smaller leaves stay in float32.


@dataclasses.dataclass(frozen=True)
class Code:
    """A way to store an array in few bits.

    Attributes:
        bits: Of each number; 32 stands for no code.
        scale: What has a scale of its own: blocks of so many numbers, or the smaller
            of the row's and the column's largest magnitude.
        levels: Magnitudes of the codes for y in 0..1: "y", "y²" or "(y + y²) / 2".
        scale_dtype: Of the scales.
        rounding: "nearest", or "stochastic" such that the mean is exact.
    """

    bits: int
    scale: int | str = "row, column"
    levels: str = "(y + y²) / 2"
    scale_dtype: str = "float32"
    rounding: str = "nearest"

    def __call__(self, m: jax.Array, key: jax.Array) -> jax.Array:
        """Returns what is read back after ``m`` was stored."""
        if self.bits == 32 or m.size < MIN_SIZE:
            return m
        top = 2 ** (self.bits - 1) - 1
        scale = self._scales(m).astype(self.scale_dtype).astype(m.dtype)
        magnitude = jnp.abs(m) / jnp.where(scale == 0, 1, scale)
        position = top * self._position(jnp.minimum(magnitude, 1))
        code = jnp.round(position)
        if self.rounding == "stochastic":
            code = jnp.floor(position)
            below, above = self._level(code / top), self._level((code + 1) / top)
            up = (magnitude - below) / (above - below)
            code += jax.random.uniform(key, m.shape) < up
        return jnp.sign(m) * self._level(jnp.minimum(code / top, 1)) * scale

    def bytes_per_param(self, rows: int = 1024, columns: int = 4096) -> float:
        """Returns bytes per number of a matrix, scales included."""
        size = rows * columns
        scales = rows + columns if isinstance(self.scale, str) else size / self.scale
        return self.bits / 8 + scales * jnp.dtype(self.scale_dtype).itemsize / size

    def _scales(self, m: jax.Array) -> jax.Array:
        x = jnp.abs(m)
        if isinstance(self.scale, str):
            row, column = (jnp.max(x, axis, keepdims=True) for axis in (-1, -2))
            return jnp.minimum(row, column)
        blocks = jnp.pad(x.ravel(), (0, -x.size % self.scale)).reshape(-1, self.scale)
        largest = jnp.broadcast_to(jnp.max(blocks, 1, keepdims=True), blocks.shape)
        return largest.ravel()[: x.size].reshape(x.shape)

    def _level(self, y: jax.Array) -> jax.Array:
        return {"y": y, "y²": y * y, "(y + y²) / 2": (y + y * y) / 2}[self.levels]

    def _position(self, x: jax.Array) -> jax.Array:
        """Returns y of a magnitude in 0..1."""
        if self.levels == "y":
            return x
        return jnp.sqrt(x) if self.levels == "y²" else (jnp.sqrt(1 + 8 * x) - 1) / 2


FLOAT32 = Code(32)
CODES = [
    Code(8),  # mu_dtype="int8"
    Code(8, levels="y"),
    Code(8, 128, levels="y"),
    Code(8, 128),
    Code(8, scale_dtype="bfloat16"),
    Code(8, rounding="stochastic"),
    Code(4),  # mu_dtype="int4"
    Code(4, levels="y"),
    Code(4, levels="y²"),
    Code(4, 32),
    Code(4, 64),
    Code(4, 128),
    Code(4, 32, levels="y"),
    Code(4, 128, levels="y"),
    Code(4, 128, levels="y²"),
    Code(4, scale_dtype="bfloat16"),
    Code(4, rounding="stochastic"),
]
TRAINED = [
    Code(8),
    Code(8, levels="y"),
    Code(4),
    Code(4, 128, levels="y²"),
    Code(4, 128, levels="y"),
    Code(4, rounding="stochastic"),
]


class RoundedState(NamedTuple):
    """State of `rounded`: the other transformation's, and the number of steps."""

    inner: Any
    count: jax.Array  # type: ignore[assignment]


def rounded(
    tx: optax.GradientTransformation, code: Code
) -> optax.GradientTransformation:
    """Stores the momentum of ``tx`` in a code."""

    def init(params: Any) -> RoundedState:
        return RoundedState(tx.init(params), jnp.zeros((), jnp.int32))

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        updates, inner = tx.update(updates, state.inner, params)
        leaves, treedef = jax.tree.flatten(optax.tree.get(inner, "mu"))
        keys = jax.random.split(jax.random.key(state.count), len(leaves))
        mu = jax.tree.unflatten(treedef, list(map(code, leaves, keys)))
        inner = optax.tree.set(inner, mu=mu)
        return updates, RoundedState(inner, state.count + 1)

    return optax.GradientTransformation(init, update)


def relative_error(code: Code, mu: Sequence[jax.Array]) -> float:
    """Returns the root mean square of a rounding over that of the momentum."""
    matrices = [m for m in mu if m.size >= MIN_SIZE]
    keys = jax.random.split(jax.random.key(0), len(matrices))
    errors = jax.tree.map(jnp.subtract, list(map(code, matrices, keys)), matrices)
    return float(optax.tree.norm(errors) / optax.tree.norm(matrices))


def train(task: Task, code: Code, seeds: int) -> tuple[list[float], list[jax.Array]]:
    """Trains with every seed; returns validation losses, and momenta of the first."""
    tx = rounded(make_optimizer(OPTIMIZER, make_schedule(OPTIMIZER, STEPS)), code)

    def loss(params: Any, batch: Any) -> jax.Array:
        mean = task.loss_fn(merge(task, params), batch, None)["loss"]
        return mean.total / mean.count

    def step(state: Any, batch: Any) -> Any:
        params, opt_state = state
        grads = jax.grad(loss)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    def run(seed: jax.Array, batches: Any, validation: Any) -> Any:
        rngs = nnx.Rngs(jax.random.key(seed))
        params = nnx.state(task.make_model(rngs), nnx.Param)
        (params, state), _ = jax.lax.scan(step, (params, tx.init(params)), batches)
        losses = jax.lax.map(lambda batch: loss(params, batch), validation)
        return jnp.mean(losses), jax.tree.leaves(optax.tree.get(state, "mu"))

    def stack(batches: Any) -> Any:
        return jax.tree.map(lambda *x: np.stack(x), *batches)

    validation = stack(
        pipeline.validation_batches(task, BATCH_SIZE, VALIDATION_BATCHES)
    )
    batches = [pipeline.train_batches(task, BATCH_SIZE, seed) for seed in range(seeds)]
    losses, mu = jax.jit(jax.vmap(run, in_axes=(0, 0, None)))(
        jnp.arange(seeds),
        stack([stack([next(b) for _ in range(STEPS)]) for b in batches]),
        validation,
    )
    return losses.tolist(), [m[0] for m in mu]


def row(code: Code, error: float, losses: Sequence[float] | None, float32: Any) -> Any:
    difference = ""
    if losses:
        differences = np.subtract(losses, float32)
        spread = np.std(differences, ddof=1) / len(differences) ** 0.5
        difference = f"{np.mean(differences):+.4f} ± {spread:.4f}"
    return {
        "bits": code.bits,
        "scale of": code.scale,
        "levels": code.levels,
        "scales in": code.scale_dtype,
        "rounding": code.rounding,
        "bytes/param": f"{code.bytes_per_param():.3f}",
        "error": f"{error:.2%}",
        "loss − float32's": difference,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=pathlib.Path, default=FOLDER)
    args = parser.parse_args()
    path = args.output / "runs.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"losses": {}, "errors": {}}
    if path.exists():
        results = json.loads(path.read_text(encoding="utf-8"))
    losses, errors, task = results["losses"], results["errors"], None
    for code in [FLOAT32, *TRAINED]:
        if str(code) not in losses:
            task = task or make_task(ModelOptions(size="nano"), corpus.TextOptions())
            losses[str(code)], mu = train(task, code, args.seeds)
            if code == FLOAT32:
                errors |= {str(code): relative_error(code, mu) for code in CODES}
            print(code, losses[str(code)], flush=True)
            text = json.dumps(results, indent=2, ensure_ascii=False)
            path.write_text(text + "\n", encoding="utf-8")
    float32 = losses[str(FLOAT32)]
    rows = [row(c, errors[str(c)], losses.get(str(c)), float32) for c in CODES]
    output.write(args.output, "table", rows, seeds=args.seeds, steps=STEPS)


if __name__ == "__main__":
    main()

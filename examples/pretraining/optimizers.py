"""The optimizers that the examples train with, all under one schedule and clipping."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import optax

import came_optax
from pretraining.errors import UserError
from pretraining.options import (
    non_negative_float,
    non_negative_int,
    option,
    positive_float,
)

FACTORING = {
    "last-two-axes": came_optax.LastTwoAxes(),
    "largest-two-axes": came_optax.LargestTwoAxes(),
    "balanced-split": came_optax.BalancedSplit(),
}


@dataclasses.dataclass(frozen=True)
class OptimizerOptions:
    """Options for the optimizer."""

    optimizer: str = option(
        "came", "update rule", choices=("came", "adamw", "adafactor")
    )
    learning_rate: float | None = option(
        None,
        "peak learning rate (default: came 1e-3, adamw and adafactor 3e-3)",
        type=positive_float,
    )
    warmup: int | None = option(
        None, "steps of linear warmup (default: a tenth of all)", type=non_negative_int
    )
    weight_decay: float = option(
        0.1, "decoupled, on kernels only", type=non_negative_float
    )
    clip_norm: float = option(1.0, "largest global gradient norm", type=positive_float)
    mu_dtype: str = option(
        "float32", "came: stores the momentum in this", metavar="DTYPE"
    )
    factoring: str = option(
        "last-two-axes",
        "came: the axes whose statistics are factored",
        choices=FACTORING,
    )
    bias_correction: bool = option(False, "came: correct moments for their zero start")
    update_clipping_threshold: float | None = option(
        None, "came: largest RMS of a leaf's update", type=positive_float
    )


def make_schedule(options: OptimizerOptions, steps: int) -> optax.Schedule:
    """Linear warmup from 0, then a cosine down to a tenth of the peak."""
    peak = options.learning_rate or _TABLE[options.optimizer].learning_rate
    warmup = steps // 10 if options.warmup is None else options.warmup
    if warmup >= steps:
        raise UserError(f"--warmup {warmup}: must be below --steps {steps}")
    return optax.warmup_cosine_decay_schedule(
        peak / (warmup + 1), peak, warmup, steps, end_value=peak / 10
    )


def make_optimizer(
    options: OptimizerOptions, schedule: optax.Schedule
) -> optax.GradientTransformation:
    """Gradient clipping, then the update rule chosen.

    Raises:
        UserError: The update rule takes no such option.
    """
    try:
        update_rule = _TABLE[options.optimizer].build(options, schedule)
    except ValueError as error:
        raise UserError(f"--optimizer {options.optimizer}: {error}") from error
    return optax.chain(optax.clip_by_global_norm(options.clip_norm), update_rule)


def decay_mask(params: Any) -> Any:
    """True for kernels: biases, norms and embeddings are not decayed."""
    return jax.tree.map_with_path(
        lambda path, _: "kernel" in jax.tree_util.keystr(path, simple=True), params
    )


def _came(options: OptimizerOptions, schedule: optax.Schedule) -> Any:
    return came_optax.came(
        schedule,
        weight_decay=options.weight_decay,
        weight_decay_mask=decay_mask,
        factoring=FACTORING[options.factoring],
        mu_dtype=options.mu_dtype,
        bias_correction=options.bias_correction,
        update_clipping_threshold=options.update_clipping_threshold,
    )


def _adamw(options: OptimizerOptions, schedule: optax.Schedule) -> Any:
    return optax.adamw(
        schedule, b2=0.95, weight_decay=options.weight_decay, mask=decay_mask
    )


def _adafactor(options: OptimizerOptions, schedule: optax.Schedule) -> Any:
    # optax.adafactor with momentum, but its weight decay is not scaled by the learning
    # rate; written out so that all optimizers decay alike.
    return optax.chain(
        optax.scale_by_factored_rms(),
        optax.clip_by_block_rms(1.0),
        optax.ema(0.9, debias=False),
        optax.add_decayed_weights(options.weight_decay, decay_mask),
        optax.scale_by_learning_rate(schedule),
    )


@dataclasses.dataclass(frozen=True)
class _Entry:
    build: Callable[[OptimizerOptions, optax.Schedule], Any]
    learning_rate: float


_TABLE = {
    "came": _Entry(_came, 1e-3),
    "adamw": _Entry(_adamw, 3e-3),
    "adafactor": _Entry(_adafactor, 3e-3),
}

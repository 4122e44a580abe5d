"""The optimizers that the examples train with, all under one schedule and clipping."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import optax

import came_optax
from pretraining.errors import UserError
from pretraining.options import (
    decay_rate,
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
        "came",
        "update rule; came is steady_came, published-came has the paper's defaults",
        choices=(
            *("came", "published-came", "adamw", "nadamw", "adafactor", "lion"),
            "muon",
        ),
    )
    learning_rate: float | None = option(
        None,
        "peak learning rate (if none: published-came and lion 1e-3, others 3e-3)",
        type=positive_float,
    )
    warmup: int | None = option(
        None, "steps of linear warmup (default: a tenth of all)", type=non_negative_int
    )
    weight_decay: float = option(
        0.1, "decoupled, on kernels only", type=non_negative_float
    )
    clip_norm: float = option(1.0, "largest global gradient norm", type=positive_float)
    b1: float | None = option(
        None,
        "decay rate of the momentum (default of this and the next: the optimizer's "
        "own); adafactor keeps none at 0",
        type=decay_rate,
    )
    b2: float | None = option(
        None,
        "came, adamw, nadamw: decay rate of the second moment; lion: of its average",
        type=decay_rate,
    )
    b3: float | None = option(
        None, "came: decay rate of the instability", type=decay_rate
    )
    eps2: float | None = option(
        None, "came: added to the instability", type=positive_float
    )
    nesterov: bool | None = option(None, "came: look one step ahead", type=bool)
    bias_correction: bool | None = option(
        None, "came: correct moments for their zero start", type=bool
    )
    update_clipping_threshold: float | None = option(
        None, "came: largest RMS of a leaf's update; 0 for any", type=non_negative_float
    )
    mu_dtype: str = option(
        "float32", "came: stores the momentum in this", metavar="DTYPE"
    )
    factoring: str = option(
        "last-two-axes",
        "came: the axes whose statistics are factored",
        choices=FACTORING,
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


def _came(
    came: Callable[..., Any], options: OptimizerOptions, schedule: optax.Schedule
) -> Any:
    own = _given(
        b1=options.b1,
        b2=options.b2,
        b3=options.b3,
        eps2=options.eps2,
        nesterov=options.nesterov,
        bias_correction=options.bias_correction,
    )
    if options.update_clipping_threshold is not None:
        own["update_clipping_threshold"] = options.update_clipping_threshold or None
    return came(
        schedule,
        **own,
        weight_decay=options.weight_decay,
        weight_decay_mask=decay_mask,
        factoring=FACTORING[options.factoring],
        mu_dtype=options.mu_dtype,
    )


def _adamw(
    adamw: Callable[..., Any], options: OptimizerOptions, schedule: optax.Schedule
) -> Any:
    betas = {"b2": 0.95} | _given(b1=options.b1, b2=options.b2)
    return adamw(schedule, **betas, weight_decay=options.weight_decay, mask=decay_mask)


def _adafactor(options: OptimizerOptions, schedule: optax.Schedule) -> Any:
    # optax.adafactor without its scaling by the parameters, as the CAME paper has it.
    # Written out because its weight decay is not scaled by the learning rate, and ours
    # has to be the same for all; and it would leave matrices below 128 unfactored.
    b1 = 0.9 if options.b1 is None else options.b1
    return optax.chain(
        optax.scale_by_factored_rms(min_dim_size_to_factor=2),
        optax.clip_by_block_rms(1.0),
        optax.ema(b1, debias=False) if b1 else optax.identity(),
        optax.add_decayed_weights(options.weight_decay, decay_mask),
        optax.scale_by_learning_rate(schedule),
    )


def _lion(options: OptimizerOptions, schedule: optax.Schedule) -> Any:
    betas = _given(b1=options.b1, b2=options.b2)
    return optax.lion(
        schedule, **betas, weight_decay=options.weight_decay, mask=decay_mask
    )


def _muon(options: OptimizerOptions, schedule: optax.Schedule) -> Any:
    # Kernels alone are orthogonalised, to updates with the RMS that AdamW's have, so
    # that one learning rate fits both; embeddings and vectors get AdamW.
    def kernels(params: Any) -> Any:
        return jax.tree.map(
            lambda decays: optax.contrib.MuonDimensionNumbers() if decays else None,
            decay_mask(params),
        )

    return optax.contrib.muon(
        schedule,
        **_given(beta=options.b1),
        adam_b2=0.95,
        weight_decay=options.weight_decay,
        muon_weight_dimension_numbers=kernels,
        consistent_rms=0.2,
    )


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


@dataclasses.dataclass(frozen=True)
class _Entry:
    build: Callable[[OptimizerOptions, optax.Schedule], Any]
    learning_rate: float


_TABLE = {
    "came": _Entry(partial(_came, came_optax.steady_came), 3e-3),
    "published-came": _Entry(partial(_came, came_optax.came), 1e-3),
    "adamw": _Entry(partial(_adamw, optax.adamw), 3e-3),
    "nadamw": _Entry(partial(_adamw, optax.nadamw), 3e-3),
    "adafactor": _Entry(_adafactor, 3e-3),
    "lion": _Entry(_lion, 1e-3),
    "muon": _Entry(_muon, 3e-3),
}

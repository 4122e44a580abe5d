"""The optimizers that the examples train with, all under one schedule and clipping."""

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import optax

import came_optax
from task import NonNegative, Positive, Rate, UserError, Whole

Optimizer = Literal[
    "steady-came",
    "came",
    "came-muon",
    "adamw",
    "nadamw",
    "adafactor",
    "lion",
    "muon",
]
CAME: dict[str, Callable[..., Any]] = {
    "steady-came": came_optax.steady_came,
    "came": came_optax.came,
    "came-muon": came_optax.came_muon,
}
OF_CAME = (
    *("b1", "b2", "b3", "eps2", "nesterov", "bias_correction"),
    *("update_clipping_threshold", "mu_dtype", "factoring"),
)
# Which of these each rule has; steady-came and came have all.
OPTIONS = {
    "came-muon": ("b1", "b2", "nesterov", "mu_dtype", "factoring"),
    "adamw": ("b1", "b2"),
    "nadamw": ("b1", "b2"),
    "lion": ("b1", "b2"),
    "adafactor": ("b1",),
    "muon": ("b1",),
}
# Peak learning rates over that of AdamW, where none is given.
RATES = {"came": 1 / 10, "lion": 1 / 3, "came-muon": 3.0, "muon": 3.0}


@dataclasses.dataclass(frozen=True)
class OptimizerOptions:
    """Options for the optimizer.

    Attributes:
        optimizer: Update rule; steady-came is the recommended CAME, came the published
            one, came-muon orthogonalises the momentum of hidden matrices.
        learning_rate: Peak learning rate; by default --base-learning-rate, a tenth of
            it for came, a third for lion, three times it for came-muon and muon.
        base_learning_rate: Peak that suits adamw and steady-came here.
        warmup: Steps of linear warmup; by default a tenth of all.
        weight_decay: Decoupled, on kernels only.
        clip_norm: Largest global gradient norm.
        b1: Decay rate of the momentum (this and the next are by default the
            optimizer's own); adafactor keeps none at 0.
        b2: Decay rate of the second moment; lion: of its average.
        b3: CAME's: decay rate of the instability.
        eps2: CAME's: added to the instability.
        nesterov: CAME's and came-muon's: look one step ahead.
        bias_correction: CAME's: correct moments for their zero start.
        update_clipping_threshold: CAME's: largest RMS of a leaf's update; 0 for any.
        mu_dtype: CAME's and came-muon's: stores the momentum in this: float32,
            bfloat16, int8 or int4.
        factoring: CAME's and came-muon's: the rule that says which axes are factored,
            such as came_optax.BalancedSplit; its own arguments as in
            --factoring.min_dim_size.
    """

    optimizer: Optimizer = "steady-came"
    learning_rate: Positive | None = None
    base_learning_rate: Positive = 3e-3
    warmup: Whole | None = None
    weight_decay: NonNegative = 0.1
    clip_norm: Positive = 1.0
    b1: Rate | None = None
    b2: Rate | None = None
    b3: Rate | None = None
    eps2: Positive | None = None
    nesterov: bool | None = None
    bias_correction: bool | None = None
    update_clipping_threshold: NonNegative | None = None
    mu_dtype: str | None = None
    factoring: came_optax.FactoringRule | None = None


def make_schedule(options: OptimizerOptions, steps: int) -> optax.Schedule:
    """Linear warmup from 0, then a cosine down to a tenth of the peak."""
    usual = RATES.get(options.optimizer, 1.0) * options.base_learning_rate
    peak = options.learning_rate or usual
    warmup = steps // 10 if options.warmup is None else options.warmup
    if warmup >= steps:
        raise UserError(f"--warmup {warmup}: must be below --steps {steps}")
    return optax.warmup_cosine_decay_schedule(
        peak / (warmup + 1), peak, warmup, steps, end_value=peak / 10
    )


def make_optimizer(
    options: OptimizerOptions,
    schedule: optax.Schedule,
    param_dtype: str = "float32",
    params_sharding: Any = None,
) -> optax.GradientTransformation:
    """Gradient clipping, then the update rule chosen.

    Args:
        options: Which, and its settings.
        schedule: The learning rate's.
        param_dtype: The parameters'; in bfloat16 the state has another byte of each.
        params_sharding: The parameters' on a mesh, on which came-muon orthogonalises
            each matrix once.

    Raises:
        UserError: The update rule takes no such option.
    """
    given = {name: value for name, value in vars(options).items() if value is not None}
    for name in set(OF_CAME) & set(given):
        if name not in OPTIONS.get(options.optimizer, OF_CAME):
            option = f"--{name.replace('_', '-')}"
            raise UserError(
                f"{option}: --optimizer {options.optimizer} has no such option"
            )
    betas: dict[str, Any] = {
        name: given[name] for name in ("b1", "b2") if name in given
    }
    decay = options.weight_decay
    update_rule: Any
    match options.optimizer:
        case "steady-came" | "came" | "came-muon" as name:
            own = {name: given[name] for name in OF_CAME if name in given}
            if own.get("update_clipping_threshold") == 0:
                own["update_clipping_threshold"] = None
            own |= {"weight_decay": decay, "weight_decay_mask": decay_mask}
            if name == "came-muon":
                own["params_sharding"] = params_sharding
            with _refusals(name):
                update_rule = CAME[name](schedule, **own)
        case "adamw" | "nadamw" as name:
            betas.setdefault("b2", 0.95)
            adamw = getattr(optax, name)
            update_rule = adamw(schedule, **betas, weight_decay=decay, mask=decay_mask)
        case "lion":
            update_rule = optax.lion(
                schedule, **betas, weight_decay=decay, mask=decay_mask
            )
        case "adafactor":
            b1 = betas.get("b1", 0.9)
            update_rule = adafactor(schedule, b1=b1, weight_decay=decay)
        case "muon":
            # To updates with the RMS that AdamW's have, so that one learning rate fits
            # both; what isn't hidden gets AdamW.
            update_rule = optax.contrib.muon(
                schedule,
                beta=betas.get("b1", 0.95),
                adam_b2=0.95,
                weight_decay=decay,
                muon_weight_dimension_numbers=muon_dimensions,
                consistent_rms=0.2,
            )
    tx = optax.chain(optax.clip_by_global_norm(options.clip_norm), update_rule)
    tx = tx if param_dtype == "float32" else came_optax.with_master_weights(tx)

    def init(params: Any) -> Any:
        with _refusals(options.optimizer):
            return tx.init(params)

    return optax.GradientTransformationExtraArgs(init, tx.update)


@contextlib.contextmanager
def _refusals(name: str) -> Iterator[None]:
    """Makes what an optimizer refuses an error of the command line."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise UserError(f"--optimizer {name}: {error}") from error


def decay_mask(params: Any) -> Any:
    """True for kernels: biases, norms and embeddings are not decayed."""
    return jax.tree.map_with_path(
        lambda path, _: "kernel" in jax.tree_util.keystr(path, simple=True), params
    )


def hidden(params: Any) -> Any:
    """True for the kernels between embeddings and the output."""
    return jax.tree.map_with_path(
        lambda path, decays: (
            decays and not re.search("head|classifier", jax.tree_util.keystr(path))
        ),
        decay_mask(params),
    )


def muon_dimensions(params: Any) -> Any:
    """Returns what `optax.contrib.muon` takes for hidden matrices."""
    return jax.tree.map(
        lambda hides: optax.contrib.MuonDimensionNumbers() if hides else None,
        hidden(params),
    )


def adafactor(
    schedule: optax.Schedule,
    *,
    b1: float = 0.0,
    decay_rate: Any = 0.8,
    weight_decay: Any,
) -> optax.GradientTransformation:
    """`optax.adafactor` without its scaling by the parameters, as CAME's paper has it.

    Written out because its weight decay is not scaled by the learning rate, and ours
    has to be the same for all; and it would leave matrices below 128 unfactored.
    """
    return optax.chain(
        optax.scale_by_factored_rms(decay_rate=decay_rate, min_dim_size_to_factor=2),
        optax.clip_by_block_rms(1.0),
        optax.ema(b1, debias=False) if b1 else optax.identity(),
        optax.add_decayed_weights(weight_decay, decay_mask),
        optax.scale_by_learning_rate(schedule),
    )

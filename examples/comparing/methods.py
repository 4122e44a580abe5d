"""The optimizers that are compared: an update rule with settings and warmup each."""

import dataclasses
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from came_optax import (
    quantized_ema,
    scale_by_came,
    scale_by_factored_moment,
    steady_came,
    with_master_weights,
)
from pretraining.training.optimizers import (
    OptimizerOptions,
    decay_mask,
    make_optimizer,
)


@dataclasses.dataclass(frozen=True)
class Method:
    """One row of the comparison.

    Attributes:
        label: For tables and plots.
        options: Of the optimizer. `learning_rate` is where the search begins.
        warmup: Part of the steps spent in warmup.
        param_dtype: In which parameters are stored; updates of narrower ones than
            float32 are rounded stochastically.
        make: Makes the optimizer from options and a schedule.
        package: What has to be installed, if anything.
    """

    label: str
    options: OptimizerOptions
    warmup: float = 0.1
    param_dtype: str = "float32"
    make: Callable[[OptimizerOptions, optax.Schedule], Any] = make_optimizer
    package: str | None = None

    @property
    def installed(self) -> bool:
        return self.package is None or bool(importlib.util.find_spec(self.package))


def _method(
    label: str,
    optimizer: str,
    learning_rate: float = 3e-3,
    warmup: float = 0.1,
    **options: Any,
) -> Method:
    options |= {"optimizer": optimizer, "learning_rate": learning_rate}
    return Method(label, OptimizerOptions(**options), warmup)


def _steady(label: str, **options: Any) -> Method:
    return _method(f"steady_came{label}", "came", **options)


def _published(
    label: str, learning_rate: float = 1e-3, warmup: float = 0.1, **options: Any
) -> Method:
    return _method(f"CAME, {label}", "published-came", learning_rate, warmup, **options)


def _flash_adamw(options: OptimizerOptions, schedule: optax.Schedule) -> Any:
    """AdamW with both moments in 8 bits, of the package flashoptim-jax."""
    import flashoptim_jax

    flash = flashoptim_jax.flash_adamw(
        1.0, b2=0.999, weight_decay=0.0, master_weight_bits=None, fused=False
    )

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        after, state = flash.step(params, state, updates)
        # Down by one learning rate of 1.
        return jax.tree.map(lambda a, b: b - a, after, params), state

    return optax.chain(
        optax.clip_by_global_norm(options.clip_norm),
        optax.GradientTransformation(flash.init, update),
        optax.add_decayed_weights(options.weight_decay, decay_mask),
        optax.scale_by_learning_rate(schedule),
    )


def _without_confidence(options: OptimizerOptions, schedule: optax.Schedule) -> Any:
    """steady_came but for the division by the instability."""
    return optax.chain(
        optax.clip_by_global_norm(options.clip_norm),
        scale_by_factored_moment(b2=0.95, bias_correction=True),
        optax.clip_by_block_rms(1.0),
        quantized_ema(0.9, nesterov=True, debias=True, mu_dtype=None),
        optax.clip_by_block_rms(1.0),
        optax.add_decayed_weights(options.weight_decay, decay_mask),
        optax.scale_by_learning_rate(schedule),
    )


def _scaled(options: OptimizerOptions, schedule: optax.Schedule) -> Any:
    """steady_came, but the RMS of every update is 0.4 instead of 1 at most."""

    def scaled(u: jax.Array) -> jax.Array:
        return 0.4 * u / (jnp.sqrt(jnp.mean(jnp.square(u))) + 1e-16)

    return optax.chain(
        optax.clip_by_global_norm(options.clip_norm),
        scale_by_came(b2=0.95, eps2=0.1, bias_correction=True, nesterov=True),
        optax.stateless(lambda updates, _: jax.tree.map(scaled, updates)),
        optax.add_decayed_weights(options.weight_decay, decay_mask),
        optax.scale_by_learning_rate(schedule),
    )


def _muon_int8(options: OptimizerOptions, schedule: optax.Schedule) -> Any:
    """Muon as compared, on a byte a parameter; steady_came, too, where it has AdamW."""

    def orthogonalized(m: jax.Array) -> jax.Array:
        a, b, c = 3.4445, -4.7750, 2.0315
        x = m / (jnp.linalg.norm(m) + 1e-8)
        x = x.T if m.shape[0] > m.shape[1] else x
        for _ in range(5):
            gram = x @ x.T
            x = a * x + (b * gram + c * gram @ gram) @ x
        x = x.T if m.shape[0] > m.shape[1] else x
        return 0.2 * max(m.shape) ** 0.5 * x

    muon = optax.chain(
        quantized_ema(0.95, nesterov=True, mu_dtype="int8"),
        optax.stateless(lambda updates, _: jax.tree.map(orthogonalized, updates)),
        optax.add_decayed_weights(options.weight_decay),
        optax.scale_by_learning_rate(schedule),
    )
    return optax.chain(
        optax.clip_by_global_norm(options.clip_norm),
        optax.partition(
            {True: muon, False: steady_came(schedule, mu_dtype="int8")}, decay_mask
        ),
    )


def _lion_int8(options: OptimizerOptions, schedule: optax.Schedule) -> Any:
    """Lion with β2 0.98 and β1 0.98²: then it is the sign of Nesterov momentum."""
    return optax.chain(
        optax.clip_by_global_norm(options.clip_norm),
        quantized_ema(0.98, nesterov=True, mu_dtype="int8"),
        optax.scale_by_sign(),
        optax.add_decayed_weights(options.weight_decay, decay_mask),
        optax.scale_by_learning_rate(schedule),
    )


def _master_weights(bits: int) -> Callable[..., Any]:
    return lambda *args: with_master_weights(make_optimizer(*args), bits)


def _nearest(options: OptimizerOptions, schedule: optax.Schedule) -> Any:
    """Updates that lead to the nearest bfloat16, and what is missing is lost."""
    tx = with_master_weights(make_optimizer(options, schedule), 32)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        nothing = jax.tree.map(jnp.zeros_like, state.remainder)
        return tx.update(updates, state._replace(remainder=nothing), params)

    return optax.GradientTransformation(tx.init, update)


# What differences are to.
REFERENCE = "steady-came"
BEFORE_NESTEROV = "came-bc-b2-0.95-eps2-0.1-clip-1"

COMPARISON = {
    REFERENCE: _steady(""),
    "adamw": _method("AdamW, β2 0.95", "adamw"),
    "adamw-b2-0.999": _method("AdamW, β2 0.999", "adamw", b2=0.999),
    "nadamw": _method("NAdamW, β2 0.95", "nadamw"),
    "nadamw-b2-0.999": _method("NAdamW, β2 0.999", "nadamw", b2=0.999),
    "flash-adamw": Method(
        "AdamW in 8 bits (flashoptim-jax), β2 0.999",
        OptimizerOptions(optimizer="adamw", learning_rate=3e-3, b2=0.999),
        make=_flash_adamw,
        package="flashoptim_jax",
    ),
    "adafactor": _method("Adafactor, momentum 0.9", "adafactor"),
    "adafactor-b1-0": _method("Adafactor, no momentum", "adafactor", b1=0.0),
    "lion": _method("Lion", "lion", 3e-4),
    "muon": _method("Muon", "muon", 1e-2),
    "muon-int8": Method(
        "Muon and steady_came, int8 momentum",
        OptimizerOptions(optimizer="muon", learning_rate=1e-2),
        make=_muon_int8,
    ),
    "lion-b2-0.98": _method("Lion, β1 0.96, β2 0.98", "lion", 3e-4, b1=0.9604, b2=0.98),
    "lion-int8": Method(
        "Lion, β1 0.96, β2 0.98, int8 momentum",
        OptimizerOptions(optimizer="lion", learning_rate=3e-4),
        make=_lion_int8,
    ),
    "came": _published("as published"),
}

STORAGE = {
    f"steady-came-{mu_dtype}": _steady(f", {mu_dtype} momentum", mu_dtype=mu_dtype)
    for mu_dtype in ("bfloat16", "int8", "int4")
}
STORAGE["steady-came-int8-bfloat16-params"] = dataclasses.replace(
    STORAGE["steady-came-int8"],
    label="steady_came, int8 momentum, bfloat16 parameters",
    param_dtype="bfloat16",
)

# Parameters in bfloat16, of which the state has what they lack, or not.
WEIGHTS = {
    f"steady-came-{bits}-bit-weights": Method(
        f"steady_came, {bits}-bit weights",
        OptimizerOptions(optimizer="came", learning_rate=3e-3),
        param_dtype="bfloat16",
        make=_master_weights(bits),
    )
    for bits in (16, 24, 32)
}
WEIGHTS["steady-came-nearest-weights"] = Method(
    "steady_came, bfloat16 weights, rounded to the nearest",
    OptimizerOptions(optimizer="came", learning_rate=3e-3),
    param_dtype="bfloat16",
    make=_nearest,
)

# steady_came but for one thing each.
ABLATIONS = {
    # Named when it was the setting that was recommended.
    BEFORE_NESTEROV: _steady(", no Nesterov momentum", nesterov=False),
    "steady-came-no-confidence": dataclasses.replace(
        _steady(", no confidence"), make=_without_confidence
    ),
    "steady-came-no-bias-correction": _steady(
        ", no bias correction", bias_correction=False
    ),
    "steady-came-no-clip": _steady(", no clip", update_clipping_threshold=0.0),
    "steady-came-rms-0.4": dataclasses.replace(
        _steady(", RMS scaled to 0.4, no clip"), make=_scaled
    ),
    "steady-came-clip-0.5": _steady(", clip 0.5", update_clipping_threshold=0.5),
    "steady-came-b2-0.99": _steady(", β2 0.99", b2=0.99),
    "steady-came-b2-0.999": _steady(", β2 0.999", b2=0.999),
    "steady-came-b3-0.999": _steady(", β3 0.999", b3=0.999),
    "steady-came-eps2-0.01": _steady(", ε2 0.01", eps2=0.01),
    "steady-came-eps2-1e-16": _steady(", ε2 1e-16", eps2=1e-16),
}

# On the way from the published form to steady_came.
STUDY = {
    "came-bc": _published("bias-corrected", 3e-3, bias_correction=True),
    "came-bc-clip-1": _published(
        "bias-corrected, update clip 1",
        3e-3,
        bias_correction=True,
        update_clipping_threshold=1.0,
    ),
    "came-bc-b2-0.95-clip-1": _published(
        "bias-corrected, β2 0.95, update clip 1",
        3e-3,
        bias_correction=True,
        b2=0.95,
        update_clipping_threshold=1.0,
    ),
    "came-clip-1": _published("update clip 1", 3e-3, update_clipping_threshold=1.0),
    "came-b2-0.95-b3-0.995": _published("β2 0.95, β3 0.995", b2=0.95, b3=0.995),
    "came-bc-b2-0.95-b3-0.995": _published(
        "bias-corrected, β2 0.95, β3 0.995",
        3e-3,
        bias_correction=True,
        b2=0.95,
        b3=0.995,
    ),
    "came-warmup-0": _published("no warmup", warmup=0.0),
    "came-warmup-2": _published("warmup 2 %", warmup=0.02),
    "came-b3-0.999": _published("β3 0.999", b3=0.999),
    "came-b3-0.9995": _published("β3 0.9995", b3=0.9995),
    "came-clip-0.5": _published("update clip 0.5", 3e-3, update_clipping_threshold=0.5),
    "came-clip-2": _published("update clip 2", 3e-3, update_clipping_threshold=2.0),
}

METHODS = COMPARISON | STORAGE | WEIGHTS | ABLATIONS | STUDY

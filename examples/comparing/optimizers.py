"""The optimizers that are compared, each a function of a schedule and its settings.

Settings may be traced: one compilation serves all of an optimizer's runs.
"""

import functools
from typing import Any

import flashoptim_jax
import jax
import jax.numpy as jnp
import optax

import came_optax
from training.optimizers import adafactor as adafactor  # Protocols name it here.
from training.optimizers import decay_mask, hidden, muon_dimensions

Tx = optax.GradientTransformation
Schedule = optax.Schedule
RMS = 0.2  # Of an orthogonalized update, as AdamW's: one learning rate fits both.


def adamw(schedule: Schedule, *, weight_decay: Any, **settings: Any) -> Tx:
    """With b1 and b2."""
    decay = {"weight_decay": weight_decay, "mask": decay_mask}
    return optax.adamw(schedule, **settings, **decay)


nadamw = functools.partial(adamw, nesterov=True)


def flash_adamw(schedule: Schedule, *, b1: Any, b2: Any, weight_decay: Any) -> Tx:
    """AdamW with both moments in 8 bits, of the package flashoptim-jax."""
    flash = flashoptim_jax.flash_adamw(
        1.0, b1, b2, weight_decay=0.0, master_weight_bits=None, fused=False
    )

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        after, state = flash.step(params, state, updates)
        # Down by one learning rate of 1.
        return jax.tree.map(lambda a, b: b - a, after, params), state

    return optax.chain(
        optax.GradientTransformation(flash.init, update),
        optax.add_decayed_weights(weight_decay, decay_mask),
        optax.scale_by_learning_rate(schedule),
    )


def steady_came(
    schedule: Schedule, *, weight_bits: int | None = None, **settings: Any
) -> Tx:
    """`weight_bits` are those that bfloat16 parameters are trained like."""
    tx = came_optax.steady_came(schedule, **settings, weight_decay_mask=decay_mask)
    return came_optax.with_master_weights(tx, weight_bits) if weight_bits else tx


def came(schedule: Schedule, **settings: Any) -> Tx:
    """As published."""
    return came_optax.came(schedule, **settings, weight_decay_mask=decay_mask)


def muon(schedule: Schedule, *, b1: Any, b2: Any, weight_decay: Any, rest: Any) -> Tx:
    """`optax.contrib`'s; β2 is that of the AdamW which the rest gets."""
    return optax.contrib.muon(
        schedule,
        beta=b1,
        weight_decay=weight_decay,
        adam_b2=b2,
        adam_learning_rate=_times(rest, schedule),
        muon_weight_dimension_numbers=muon_dimensions,
        consistent_rms=RMS,
    )


def normuon(
    schedule: Schedule,
    *,
    b1: Any,
    b2: Any,
    weight_decay: Any,
    rest: Any,
    nesterov: bool = False,
) -> Tx:
    """Li et al., 2025: a second moment of each neuron after Newton–Schulz.

    Nesterov momentum is not in the paper, but in its authors' code.
    """
    momentum = came_optax.quantized_ema(b1, nesterov=nesterov, mu_dtype=None)
    update = optax.chain(momentum, newton_schulz(), scale_by_neurons(b2), to_rms())
    adam = optax.adamw(_times(rest, schedule), b2=b2, weight_decay=0.0, nesterov=True)
    return _hidden_and_rest(update, adam, schedule, weight_decay)


def came_muon(
    schedule: Schedule,
    *,
    form: str,
    weight_decay: Any,
    rest: Any,
    mu_dtype: str = "float32",
    **settings: Any,
) -> Tx:
    """CAME's statistics around Newton–Schulz, and `steady_came` for the rest.

    Args:
        schedule: The learning rate.
        form: Where the statistics are, of `FORMS`.
        weight_decay: Of the hidden matrices.
        rest: Learning rate of the rest, over that of the hidden matrices.
        mu_dtype: What both store their momentum in.
        **settings: b1 and b2, and b3 and eps2 if the form has a confidence term.
    """
    others = steady_came(_times(rest, schedule), mu_dtype=mu_dtype)
    update = FORMS[form](mu_dtype=mu_dtype, **settings)
    return _hidden_and_rest(update, others, schedule, weight_decay)


def called(schedule: Schedule, *, rest: Any = 1.0, **settings: Any) -> Tx:
    """`came_muon` as the library has it; `rest` is as above."""
    return came_optax.came_muon(
        schedule,
        rest_learning_rate_scale=rest,
        weight_decay_mask=decay_mask,
        **settings,
    )


def _came_before(**settings: Any) -> Tx:
    update = came_optax.scale_by_came(**settings, nesterov=True, bias_correction=True)
    return optax.chain(update, newton_schulz(), optax.scale(RMS))


def _moment_before(*, b1: Any, b2: Any, mu_dtype: str) -> Tx:
    return optax.chain(
        came_optax.scale_by_factored_moment(b2, bias_correction=True),
        optax.clip_by_block_rms(1.0),
        came_optax.quantized_ema(b1, nesterov=True, debias=True, mu_dtype=mu_dtype),
        newton_schulz(),
        optax.scale(RMS),
    )


def _moment_after(*, b1: Any, b2: Any, mu_dtype: str) -> Tx:
    return optax.chain(
        came_optax.quantized_ema(b1, nesterov=True, debias=True, mu_dtype=mu_dtype),
        newton_schulz(),
        came_optax.scale_by_factored_moment(b2, bias_correction=True),
        to_rms(),
    )


FORMS = {
    "came before": _came_before,
    "moment before": _moment_before,
    "moment after": _moment_after,
}


def newton_schulz() -> Tx:
    """Brings each matrix near its polar factor, to an RMS of about 1."""

    def polar(m: jax.Array) -> jax.Array:
        x = m / (jnp.linalg.norm(m) + 1e-8)
        x = x.T if m.shape[0] > m.shape[1] else x
        for _ in range(5):
            gram = x @ x.T
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        return max(m.shape) ** 0.5 * (x.T if m.shape[0] > m.shape[1] else x)

    return optax.stateless(lambda updates, _: jax.tree.map(polar, updates))


def scale_by_neurons(b2: Any) -> Tx:
    """Divides each column of an (in, out) kernel by the root of its second moment."""

    def init(params: Any) -> Any:
        return jax.tree.map(lambda p: jnp.zeros_like(p, shape=p.shape[1:]), params)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        del params
        state = jax.tree.map(
            lambda v, u: b2 * v + (1 - b2) * jnp.mean(jnp.square(u), 0), state, updates
        )
        divided = jax.tree.map(lambda u, v: u / (v[None] ** 0.5 + 1e-8), updates, state)
        return divided, state

    return optax.GradientTransformation(init, update)


def to_rms() -> Tx:
    """Scales each leaf's update to an RMS of 0.2."""

    def scaled(u: jax.Array) -> jax.Array:
        return RMS * u / (jnp.sqrt(jnp.mean(jnp.square(u))) + 1e-16)

    return optax.stateless(lambda updates, _: jax.tree.map(scaled, updates))


def _times(factor: Any, schedule: Schedule) -> Schedule:
    return lambda count: factor * schedule(count)


def _hidden_and_rest(update: Tx, rest: Tx, schedule: Schedule, weight_decay: Any) -> Tx:
    matrices = optax.chain(
        update,
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(schedule),
    )
    return optax.partition({True: matrices, False: rest}, hidden)

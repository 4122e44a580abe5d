"""CAME, as published and in the recommended setting."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.typing import ArrayLike

from came_optax._algorithm import Hyperparameters
from came_optax._checks import check_learning_rate, check_scalar
from came_optax._factored_axes import FactoringRule
from came_optax._factoring import LastTwoAxes
from came_optax._momentum import MuDtype
from came_optax._scale_by_came import came_transform
from came_optax._transformation import transformation
from came_optax._weight_decay import add_decayed_weights


def came(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    *,
    b3: ArrayLike = 0.9999,
    eps1: ArrayLike = 1e-30,
    eps2: ArrayLike = 1e-16,
    clipping_threshold: ArrayLike | None = 1.0,
    weight_decay: float | jax.Array = 0.0,
    weight_decay_mask: Any | Callable[[optax.Params], Any] | None = None,
    factoring: FactoringRule = LastTwoAxes(),
    mu_dtype: MuDtype = None,
    nesterov: bool = False,
    bias_correction: bool = False,
    update_clipping_threshold: ArrayLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""CAME: Adam's momentum with Adafactor's memory, guided by confidence.

    For each parameter :math:`\theta` with gradient :math:`g`, and all state zero at the
    start:

    .. math::

        v_r &\leftarrow \beta_2 v_r + (1 - \beta_2)
            \operatorname{mean}_{col}(|g|^2 + \varepsilon_1),
            \quad v_c \text{ likewise} \\
        u &= g \, / \sqrt{v_r v_c^\top / \operatorname{mean}(v_r)} \\
        u &\leftarrow u \, / \max(1, \operatorname{RMS}(u) / d) \\
        m &\leftarrow \beta_1 m + (1 - \beta_1) u \\
        s_r &\leftarrow \beta_3 s_r + (1 - \beta_3)
            \operatorname{mean}_{col}(|u - m|^2 + \varepsilon_2),
            \quad s_c \text{ likewise} \\
        \theta &\leftarrow \theta - \eta \left(
            m \, / \sqrt{s_r s_c^\top / \operatorname{mean}(s_r)}
            + \lambda \theta \right)

    Vectors and scalars keep the full :math:`v`, and their update is :math:`m`. State
    takes about 4 bytes per parameter, half of Adam's; 2, 1 or 0.5 with ``mu_dtype``
    ``"bfloat16"``, ``"int8"`` or ``"int4"``.

    The published algorithm (the default) corrects no bias. Its first step of a matrix
    is 11 times the learning rate if ``|g|`` has rank 1, and updates in training are
    longer still: take a tenth of AdamW's learning rate and warm up over a tenth of the
    steps, or take :func:`steady_came`.

    Gradients that are NaN or infinite pass through as such; ``optax.apply_if_finite``
    is the guard, where gradients have the parameters' dtype. Means are global under
    ``jit`` with sharded arrays, but local inside ``shard_map``, where the statistics of
    each shard would be its own.

    Args:
      learning_rate: step size :math:`\eta`, a number or a schedule.
      b1: decay rate of the momentum, :math:`\beta_1`; 0 ≤ b1 < 1.
      b2: decay rate of the second moment, :math:`\beta_2`; 0 ≤ b2 < 1.
      b3: decay rate of the instability, :math:`\beta_3`; 0 ≤ b3 < 1.
      eps1: added to the squared gradient, :math:`\varepsilon_1`; ≥ 1e-30.
      eps2: added to the instability, :math:`\varepsilon_2`; ≥ 1e-30.
      clipping_threshold: largest root mean square of u, :math:`d`; > 0, or None.
      weight_decay: decoupled weight decay :math:`\lambda`, multiplied by the learning
        rate; if not 0, ``update`` needs ``params``. For a schedule, see
        ``optax.inject_hyperparams``.
      weight_decay_mask: a tree of bools (or a function from parameters to one) that is
        True where weight decay applies, as in ``optax.add_decayed_weights``. For
        ``optax.inject_hyperparams`` name a function in ``static_args``.
      factoring: which axes of each leaf are rows and columns: by default its last two.
        Attention kernels of three axes need :class:`BalancedSplit`.
      mu_dtype: how momentum is stored: ``"float32"`` (float64 for float64 parameters),
        ``"bfloat16"``, ``"int8"`` or ``"int4"``; in 8 and 4 bits with a scale for each
        row and column, and float32 in leaves of fewer than 4096 elements. With a b1
        above 0.996 bfloat16 does not forget: see :func:`scale_by_confidence`.
      nesterov: the update takes :math:`\beta_1 m + (1 - \beta_1) u` for :math:`m`, as
        in ``optax.adam``.
      bias_correction: correct the second moment, the momentum of the update and the
        instability for their start at zero.
      update_clipping_threshold: largest root mean square of a leaf's final update,
        before learning rate and weight decay; > 0, or None.

    Returns:
      The optimizer. Its updates have the parameters' dtype (the gradients', without
      ``params``).

    Raises:
      ValueError: an argument or a leaf's axes are out of range.
      TypeError: integer leaves, or a state that another transformation made.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from came_optax import came
      >>> params = {"kernel": jnp.ones((4, 4)), "bias": jnp.zeros(4)}
      >>> loss = lambda p: jnp.sum((jnp.ones(4) @ p["kernel"] + p["bias"]) ** 2)
      >>> tx = came(learning_rate=optax.warmup_constant_schedule(0.0, 1e-2, 10))
      >>> state = tx.init(params)
      >>> for _ in range(50):
      ...     updates, state = tx.update(jax.grad(loss)(params), state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> bool(loss(params) < 0.1)
      True

    References:
      Luo et al., `CAME: Confidence-guided Adaptive Memory Efficient Optimization
      <https://arxiv.org/abs/2307.02047>`_, ACL 2023.
    """
    transform = came_transform(
        "came",
        Hyperparameters(
            b1=b1,
            b2=b2,
            b3=b3,
            eps1=eps1,
            eps2=eps2,
            clip=clipping_threshold,
            update_clip=update_clipping_threshold,
            nesterov=nesterov,
        ),
        bias_correction,
        factoring,
        mu_dtype,
    )
    check_scalar("weight_decay", weight_decay, at_least=0, below=math.inf)
    check_learning_rate(learning_rate)
    return transformation(
        transform,
        add_decayed_weights(weight_decay, weight_decay_mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def steady_came(  # noqa: D417  # They are those of came.
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.95,
    *,
    b3: ArrayLike = 0.9999,
    eps1: ArrayLike = 1e-30,
    eps2: ArrayLike = 0.1,
    clipping_threshold: ArrayLike | None = 1.0,
    weight_decay: float | jax.Array = 0.0,
    weight_decay_mask: Any | Callable[[optax.Params], Any] | None = None,
    factoring: FactoringRule = LastTwoAxes(min_dim_size=2),
    mu_dtype: MuDtype = None,
    nesterov: bool = True,
    bias_correction: bool = True,
    update_clipping_threshold: ArrayLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""CAME in its recommended setting: :func:`came` with other defaults.

    It takes AdamW's learning rate and its warmup, on half of AdamW's state, or an
    eighth with ``mu_dtype="int8"``. At step :math:`t`, in a leaf that is factored:

    .. math::

        v_r &\leftarrow \beta_2 v_r + (1 - \beta_2)
            \operatorname{mean}_{col}(|g|^2 + \varepsilon_1),
            \quad v_c \text{ likewise} \\
        u &= \sqrt{1 - \beta_2^t} \, g \, / \sqrt{v_r v_c^\top /
            \operatorname{mean}(v_r)} \\
        u &\leftarrow u \, / \max(1, \operatorname{RMS}(u) / d) \\
        m &\leftarrow \beta_1 m + (1 - \beta_1) u \\
        n &= \beta_1 m / (1 - \beta_1^{t+1}) + (1 - \beta_1) u / (1 - \beta_1^t) \\
        s_r &\leftarrow \beta_3 s_r + (1 - \beta_3)
            \operatorname{mean}_{col}(|u - m|^2 + \varepsilon_2),
            \quad s_c \text{ likewise} \\
        \theta &\leftarrow \theta - \eta \left( \sqrt{1 - \beta_3^t} \, n \,
            / \sqrt{s_r s_c^\top / \operatorname{mean}(s_r)} + \lambda \theta \right)

    Vectors and scalars keep the full :math:`v`, and their update is :math:`n`. What
    differs from :func:`came`, and why:

    - ``bias_correction=True``: averages are corrected for their start at zero.
    - ``nesterov=True``: the update looks one step ahead.
    - ``b2=0.95`` and ``eps2=0.1``: after a rare gradient a row of an embedding moves
      9 to 14 learning rates in all (Adam 30, with b2 0.95: 6; :func:`came` 109).
      Under constant gradients updates stay below 1/√eps2 = 3.2 learning rates.
    - ``LastTwoAxes(min_dim_size=2)``: a matrix of one row or column, as in a LoRA of
      rank 1, is kept whole, for less than statistics of rows and columns would take.

    Args:
      learning_rate: step size, a number or a schedule; begin with AdamW's.
      b1, ...: all other arguments are as in :func:`came`.

    Returns:
      The optimizer, as :func:`came` does, which raises the same errors.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from came_optax import steady_came
      >>> params = {"kernel": jnp.ones((64, 64)), "bias": jnp.zeros(64)}
      >>> tx = steady_came(1e-3, weight_decay=0.1, mu_dtype="int8")
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> params = optax.apply_updates(params, updates)

    References:
      Luo et al., `CAME <https://arxiv.org/abs/2307.02047>`_, 2023; Dozat,
      `Incorporating Nesterov momentum into Adam
      <https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ>`_, 2016.
    """
    return came(
        learning_rate,
        b1,
        b2,
        b3=b3,
        eps1=eps1,
        eps2=eps2,
        clipping_threshold=clipping_threshold,
        weight_decay=weight_decay,
        weight_decay_mask=weight_decay_mask,
        factoring=factoring,
        mu_dtype=mu_dtype,
        nesterov=nesterov,
        bias_correction=bias_correction,
        update_clipping_threshold=update_clipping_threshold,
    )

"""Momentum in 8 or 4 bits for any chain."""

from __future__ import annotations

from typing import NamedTuple

import optax
from jax.typing import ArrayLike

from came_optax._algorithm import Hyperparameters
from came_optax._checks import check_decay, check_flag
from came_optax._factored_axes import FactoringRule
from came_optax._factoring import LastTwoAxes
from came_optax._momentum import MuDtype, dtype_name
from came_optax._transformation import LeafTransform, transformation


class QuantizedEmaState(NamedTuple):
    """State of :func:`quantized_ema`.

    Attributes:
      count: number of updates so far; shape (), int32.
      mu: the average of the updates, structured like the parameters: an array of the
        leaf's shape in the dtype that ``mu_dtype`` says, or with ``"int8"`` and
        ``"int4"`` :class:`Codes`.
    """

    count: ArrayLike  # type: ignore[assignment]  # hides tuple.count
    mu: optax.Updates


def quantized_ema(
    decay: ArrayLike,
    *,
    nesterov: bool = False,
    debias: bool = False,
    mu_dtype: MuDtype = "int8",
    factoring: FactoringRule = LastTwoAxes(),
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces updates by their moving average, stored in 8 or 4 bits.

    .. math::

        m &\leftarrow \beta m + (1 - \beta) u \\
        \Delta &= m
            \quad\text{or, with Nesterov momentum,}\quad \beta m + (1 - \beta) u

    ``optax.ema`` with the storage, the sharding and the checks of :func:`came`; but
    ``debias`` is off unless asked for. Before :func:`orthogonalize` it makes Muon on a
    byte of state a parameter.

    Args:
      decay: decay rate :math:`\beta`; 0 ≤ decay < 1.
      nesterov: look one step ahead.
      debias: correct for the average's start at zero: divide m by
        :math:`1 - \beta^t`; with Nesterov momentum the update is
        :math:`\beta m / (1 - \beta^{t+1}) + (1 - \beta) u / (1 - \beta^t)`.
      mu_dtype: how the average is stored: None or float32 (float64 for float64
        parameters), bfloat16 (for a decay of up to 0.996), int8 or int4, as a dtype or
        its name.
      factoring: which axes of each leaf are the rows and columns that share a scale.

    Returns:
      A transformation with state :class:`QuantizedEmaState`. It returns updates of the
      dtype that it is given and needs no ``params``.

    Raises:
      ValueError: an argument or a leaf's axes are out of range.
      TypeError: integer leaves, or a state that another transformation made.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from came_optax import quantized_ema
      >>> lion_like = optax.chain(quantized_ema(0.95), optax.stateless(
      ...     lambda updates, params: optax.tree.map(jnp.sign, updates)))
      >>> params = {"kernel": jnp.ones((64, 64))}
      >>> lion_like.init(params)[0].mu["kernel"].values.dtype
      dtype('int8')

    References:
      Dettmers et al., `8-bit optimizers via block-wise quantization
      <https://arxiv.org/abs/2110.02861>`_, 2022.
    """
    check_decay("decay", decay)
    check_flag("nesterov", nesterov)
    check_flag("debias", debias)
    return transformation(
        LeafTransform(
            "quantized_ema",
            QuantizedEmaState,
            Hyperparameters(b1=decay, nesterov=nesterov),
            debias,
            factoring,
            dtype_name(mu_dtype),
        )
    )

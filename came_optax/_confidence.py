"""The second half of CAME: momentum, and confidence in it."""

from __future__ import annotations

from typing import NamedTuple

import optax
from jax.typing import ArrayLike

from came_optax._algorithm import Hyperparameters
from came_optax._checks import check_decay, check_epsilon, check_flag
from came_optax._factored_axes import FactoringRule
from came_optax._factoring import LastTwoAxes
from came_optax._momentum import MuDtype, dtype_name
from came_optax._transformation import LeafTransform, transformation


class ScaleByConfidenceState(NamedTuple):
    """State of :func:`scale_by_confidence`.

    The trees have the parameters' structure. Statistics are float32 (float64 for
    float64 and complex128 parameters); a leaf holds zeros of shape (1,) for what it
    lacks.

    Attributes:
      count: number of updates so far; shape (), int32. After :func:`convert_state`
        from another algorithm it goes on from 10⁷: nothing is to be corrected.
      mu: first moment of the updates: an array of the leaf's shape in the dtype that
        ``mu_dtype`` says, or with ``"int8"`` and ``"int4"`` :class:`Codes`.
      s_row: factored leaves: mean of the instability ``|u − m|²`` over ``col`` axes;
        the leaf's shape without them.
      s_col: factored leaves: mean of the instability over ``row`` axes; the leaf's
        shape without them.
    """

    count: ArrayLike  # type: ignore[assignment]  # hides tuple.count
    mu: optax.Updates
    s_row: optax.Updates
    s_col: optax.Updates


def scale_by_confidence(
    b1: ArrayLike = 0.9,
    b3: ArrayLike = 0.9999,
    eps2: ArrayLike = 1e-16,
    *,
    factoring: FactoringRule = LastTwoAxes(),
    mu_dtype: MuDtype = None,
    nesterov: bool = False,
    bias_correction: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces updates by their momentum, scaled by the confidence in it.

    .. math::

        m &\leftarrow \beta_1 m + (1 - \beta_1) u \\
        s_r &\leftarrow \beta_3 s_r + (1 - \beta_3)
            \operatorname{mean}_{col}(|u - m|^2 + \varepsilon_2) \\
        s_c &\leftarrow \beta_3 s_c + (1 - \beta_3)
            \operatorname{mean}_{row}(|u - m|^2 + \varepsilon_2) \\
        \Delta &= m \, / \sqrt{s_r s_c^\top / \operatorname{mean}(s_r)}

    This is the second half of Algorithm 2. Where updates agree with their momentum,
    the instability :math:`|u - m|^2` is small and the step large. Leaves that are not
    factored have no confidence term: :math:`\Delta = m`. Works after any
    transformation whose updates are of order 1, such as ``optax.scale_by_rms``.

    Args:
      b1: decay rate of the momentum, :math:`\beta_1`; 0 ≤ b1 < 1.
      b3: decay rate of the instability, :math:`\beta_3`; 0 ≤ b3 < 1.
      eps2: added to the instability, :math:`\varepsilon_2`; ≥ 1e-30.
      factoring: which axes of each leaf are rows and columns.
      mu_dtype: how momentum is stored between steps: None or float32 (float64 for
        float64 parameters), bfloat16, int8 or int4, as a dtype or its name. The step
        that stores it uses the unrounded momentum. Integers are codes with a scale for
        each row and column; leaves of fewer than 4096 elements, and those whose codes
        and scales would take no less, stay float32, and complex momentum complex.
        bfloat16 is rounded to nearest, as in ``optax.adam``: where gradients stay 0 and
        b1 is above 0.996, momentum is rounded to what it was, and stays. Codes, which
        are rounded up or down by turns, decay at any b1.
      nesterov: look one step ahead: the update takes
        :math:`\beta_1 m + (1 - \beta_1) u` for :math:`m`.
      bias_correction: divide the instability by :math:`1 - \beta_3^t` and the momentum
        in the update by :math:`1 - \beta_1^t`; with Nesterov momentum the update takes
        :math:`\beta_1 m / (1 - \beta_1^{t+1}) + (1 - \beta_1) u / (1 - \beta_1^t)`
        for :math:`m`. The residual :math:`u - m` keeps the
        uncorrected momentum: with the corrected one it would be 0 at the first step.

    Returns:
      A transformation with state :class:`ScaleByConfidenceState`. It returns updates
      of the dtype that it is given and does not need ``params``.

    Raises:
      ValueError: an argument or a leaf's axes are out of range.
      TypeError: integer leaves, or a state that another transformation made.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from came_optax import scale_by_confidence
      >>> rms = optax.scale_by_rms()
      >>> tx = optax.chain(rms, scale_by_confidence(), optax.scale(-1e-3))
      >>> params = {"kernel": jnp.ones((4, 3))}
      >>> updates, state = tx.update(params, tx.init(params))
      >>> updates["kernel"].shape
      (4, 3)

    References:
      Luo et al., `CAME <https://arxiv.org/abs/2307.02047>`_, 2023.
    """
    check_decay("b1", b1)
    check_decay("b3", b3)
    check_epsilon("eps2", eps2)
    check_flag("nesterov", nesterov)
    check_flag("bias_correction", bias_correction)
    return transformation(
        LeafTransform(
            "scale_by_confidence",
            ScaleByConfidenceState,
            Hyperparameters(b1=b1, b3=b3, eps2=eps2, nesterov=nesterov),
            bias_correction,
            factoring,
            dtype_name(mu_dtype),
        )
    )

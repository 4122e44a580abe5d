"""The first half of CAME: Adafactor's factored second moment."""

from __future__ import annotations

from typing import NamedTuple

import optax
from jax.typing import ArrayLike

from came_optax._algorithm import Hyperparameters
from came_optax._checks import check_decay, check_epsilon, check_flag
from came_optax._factored_axes import FactoringRule
from came_optax._factoring import LastTwoAxes
from came_optax._transformation import LeafTransform, transformation


class ScaleByFactoredMomentState(NamedTuple):
    """State of :func:`scale_by_factored_moment`.

    The trees have the parameters' structure. Arrays are float32 (float64 for float64
    and complex128 parameters); a leaf holds zeros of shape (1,) for what it lacks.

    Attributes:
      count: number of updates so far; shape (), int32. After :func:`convert_state`
        from another algorithm it goes on from 10⁷: nothing is to be corrected.
      v_row: factored leaves: mean of ``|g|²`` over ``col`` axes; the leaf's shape
        without them.
      v_col: factored leaves: mean of ``|g|²`` over ``row`` axes; the leaf's shape
        without them.
      v: other leaves: ``|g|²``; the leaf's shape.
    """

    count: ArrayLike  # type: ignore[assignment]  # hides tuple.count
    v_row: optax.Updates
    v_col: optax.Updates
    v: optax.Updates


def scale_by_factored_moment(
    b2: ArrayLike = 0.999,
    eps1: ArrayLike = 1e-30,
    *,
    factoring: FactoringRule = LastTwoAxes(),
    bias_correction: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Divides updates by the root of a factored second moment.

    .. math::

        v_r &\leftarrow \beta_2 v_r + (1 - \beta_2)
            \operatorname{mean}_{col}(|g|^2 + \varepsilon_1) \\
        v_c &\leftarrow \beta_2 v_c + (1 - \beta_2)
            \operatorname{mean}_{row}(|g|^2 + \varepsilon_1) \\
        u &= g \, / \sqrt{v_r v_c^\top / \operatorname{mean}(v_r)}

    This is the first half of Algorithm 2. Leaves that are not factored keep the full
    second moment: :math:`u = g / \sqrt{v}`. There is no clipping here, and the decay
    does not change with time as it does in ``optax.scale_by_factored_rms``.

    Args:
      b2: decay rate of the second moment, :math:`\beta_2`; 0 ≤ b2 < 1.
      eps1: added to the squared gradient, :math:`\varepsilon_1`; ≥ 1e-30.
      factoring: which axes of each leaf are rows and columns.
      bias_correction: divide the second moment by :math:`1 - \beta_2^t`.

    Returns:
      A transformation with state :class:`ScaleByFactoredMomentState`. It returns
      updates of the dtype that it is given and does not need ``params``.

    Raises:
      ValueError: an argument or a leaf's axes are out of range.
      TypeError: integer leaves, or a state that another transformation made.

    References:
      Shazeer and Stern, `Adafactor <https://arxiv.org/abs/1804.04235>`_, 2018;
      Luo et al., `CAME <https://arxiv.org/abs/2307.02047>`_, 2023.
    """
    check_decay("b2", b2)
    check_epsilon("eps1", eps1)
    check_flag("bias_correction", bias_correction)
    return transformation(
        LeafTransform(
            "scale_by_factored_moment",
            ScaleByFactoredMomentState,
            Hyperparameters(b2=b2, eps1=eps1, clip=None),
            bias_correction,
            factoring,
        )
    )

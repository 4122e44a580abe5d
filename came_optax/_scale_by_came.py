"""CAME without learning rate and weight decay."""

from __future__ import annotations

from typing import NamedTuple

import optax
from jax.typing import ArrayLike

from came_optax._algorithm import Hyperparameters
from came_optax._checks import (
    check_decay,
    check_epsilon,
    check_flag,
    check_threshold,
)
from came_optax._factored_axes import FactoringRule
from came_optax._factoring import LastTwoAxes
from came_optax._momentum import MuDtype, dtype_name
from came_optax._transformation import LeafTransform, transformation


class ScaleByCameState(NamedTuple):
    """State of :func:`scale_by_came`, and the first part of :func:`came`'s.

    The trees have the parameters' structure. Statistics are float32 (float64 for
    float64 and complex128 parameters); a leaf holds zeros of shape (1,) for what it
    lacks.

    Attributes:
      count: number of updates so far; shape (), int32. After :func:`convert_state`
        from another algorithm it goes on from 10⁷: nothing is to be corrected.
      v_row: factored leaves: mean of ``|g|²`` over ``col`` axes; the leaf's shape
        without them.
      v_col: factored leaves: mean of ``|g|²`` over ``row`` axes; the leaf's shape
        without them.
      v: other leaves: ``|g|²``; the leaf's shape.
      mu: first moment of the updates: an array of the leaf's shape in the dtype that
        ``mu_dtype`` says, or with ``"int8"`` and ``"int4"`` :class:`Codes`.
      s_row: factored leaves: mean of the instability ``|u − m|²`` over ``col`` axes;
        the leaf's shape without them.
      s_col: factored leaves: mean of the instability over ``row`` axes; the leaf's
        shape without them.
    """

    count: ArrayLike  # type: ignore[assignment]  # hides tuple.count
    v_row: optax.Updates
    v_col: optax.Updates
    v: optax.Updates
    mu: optax.Updates
    s_row: optax.Updates
    s_col: optax.Updates


def scale_by_came(
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    *,
    b3: ArrayLike = 0.9999,
    eps1: ArrayLike = 1e-30,
    eps2: ArrayLike = 1e-16,
    clipping_threshold: ArrayLike | None = 1.0,
    factoring: FactoringRule = LastTwoAxes(),
    mu_dtype: MuDtype = None,
    nesterov: bool = False,
    bias_correction: bool = False,
    update_clipping_threshold: ArrayLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Rescales updates by the CAME algorithm, without learning rate or weight decay.

    The values are those of a chain of :func:`scale_by_factored_moment`, a clip of each
    leaf's root mean square, and :func:`scale_by_confidence`; but this is one
    transformation, with one state, in float32 (float64 for float64 parameters)
    throughout. See :func:`came` for the equations.

    Args:
      b1: decay rate of the momentum, :math:`\beta_1`; 0 ≤ b1 < 1.
      b2: decay rate of the second moment, :math:`\beta_2`; 0 ≤ b2 < 1.
      b3: decay rate of the instability, :math:`\beta_3`; 0 ≤ b3 < 1.
      eps1: added to the squared gradient, :math:`\varepsilon_1`; ≥ 1e-30.
      eps2: added to the instability, :math:`\varepsilon_2`; ≥ 1e-30.
      clipping_threshold: largest root mean square of u, :math:`d`; > 0, or None.
      factoring: which axes of each leaf are rows and columns.
      mu_dtype: how momentum is stored: ``"float32"``, ``"bfloat16"`` (for a b1 of up to
        0.996), ``"int8"`` or ``"int4"``.
      nesterov: the update takes :math:`\beta_1 m + (1 - \beta_1) u` for :math:`m`, as
        in ``optax.adam``.
      bias_correction: correct the second moment, the momentum of the update and the
        instability for their start at zero.
      update_clipping_threshold: largest root mean square of a leaf's final update; > 0,
        or None.

    Returns:
      A transformation whose updates have the parameters' dtype (the gradients', without
      ``params``).

    Raises:
      ValueError: an argument or a leaf's axes are out of range.
      TypeError: integer leaves, or a state that another transformation made.

    References:
      Luo et al., `CAME <https://arxiv.org/abs/2307.02047>`_, 2023.
    """
    return transformation(
        came_transform(
            "scale_by_came",
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
    )


def came_transform(
    made_by: str,
    h: Hyperparameters,
    bias_correction: bool,
    factoring: FactoringRule,
    mu_dtype: MuDtype,
) -> LeafTransform:
    """Returns what is done to every leaf.

    Raises:
      ValueError: a hyperparameter is out of range.
      TypeError: one is no number.
    """
    for name in ("b1", "b2", "b3"):
        check_decay(name, getattr(h, name))
    for name in ("eps1", "eps2"):
        check_epsilon(name, getattr(h, name))
    check_threshold("clipping_threshold", h.clip)
    check_threshold("update_clipping_threshold", h.update_clip)
    check_flag("nesterov", h.nesterov)
    check_flag("bias_correction", bias_correction)
    return LeafTransform(
        made_by,
        ScaleByCameState,
        h,
        bias_correction,
        factoring,
        dtype_name(mu_dtype),
        to_params_dtype=True,
    )

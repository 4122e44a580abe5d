"""What :func:`came_muon` does to hidden matrices."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from came_optax._algorithm import Hyperparameters, square
from came_optax._checks import check_decay, check_flag, check_threshold
from came_optax._factored_axes import FactoringRule, checked_axes
from came_optax._momentum import MuDtype, dtype_name
from came_optax._paths import KeyPath
from came_optax._quantized_ema import QuantizedEmaState
from came_optax._transformation import LeafTransform


class CameMuonState(NamedTuple):
    """State of the hidden matrices of :func:`came_muon`.

    The trees have the parameters' structure. Statistics are float32 (float64 for
    float64 and complex128 parameters).

    Attributes:
      count: number of updates so far; shape (), int32. After :func:`convert_state`
        from another algorithm it goes on from 10⁷: nothing is to be corrected.
      mu: first moment of the gradients: an array of the leaf's shape in the dtype that
        ``mu_dtype`` says, or with ``"int8"`` and ``"int4"`` :class:`Codes`.
      v_row: mean over ``col`` axes of the squares of the orthogonalised momentum, times
        max(rows, columns); the leaf's shape without them.
      v_col: mean over ``row`` axes of the same; the leaf's shape without them.
    """

    count: ArrayLike  # type: ignore[assignment]  # hides tuple.count
    mu: optax.Updates
    v_row: optax.Updates
    v_col: optax.Updates


class _MomentState(NamedTuple):
    count: ArrayLike  # type: ignore[assignment]
    v_row: optax.Updates
    v_col: optax.Updates


@dataclasses.dataclass(frozen=True)
class MatrixTransform:
    """Momentum, orthogonalised, with its rows and its columns brought to one size.

    It has one state, so that other optimizers' momentum can become it.

    Attributes:
      momentum: of the gradients.
      orthogonalize: what comes next.
      moment: factored, of the orthogonalised momentum, which is divided by its root.
      consistent_rms: see :func:`came_muon`.
    """

    momentum: LeafTransform
    orthogonalize: optax.GradientTransformation
    moment: LeafTransform
    consistent_rms: ArrayLike | None

    made_by = "came_muon"
    state_type = CameMuonState
    to_params_dtype = True

    @property
    def factoring(self) -> FactoringRule:
        """Which axes of each leaf are rows and columns."""
        return self.momentum.factoring

    def init(self, params: Any) -> CameMuonState:
        """Returns the state of parameters."""
        self.orthogonalize.init(params)
        average, v = self.momentum.init(params), self.moment.init(params)
        return CameMuonState(average.count, average.mu, v.v_row, v.v_col)

    def update(self, updates: Any, state: CameMuonState) -> tuple[Any, CameMuonState]:
        """Returns the updates, unrounded, and the new state."""
        average = QuantizedEmaState(state.count, state.mu)
        v = _MomentState(state.count, state.v_row, state.v_col)
        updates, average = self.momentum.update(updates, average)
        updates, _ = self.orthogonalize.update(updates, optax.EmptyState())
        updates, v = self.moment.update(updates, v)
        updates = jax.tree.map_with_path(self._to_rms, updates)
        return updates, CameMuonState(average.count, average.mu, v.v_row, v.v_col)

    def _to_rms(self, path: KeyPath, u: jax.Array) -> jax.Array:
        """Scales each matrix to one root mean square, or leaves it 0."""
        axes = checked_axes(self.factoring, path, u.shape)
        wanted = self.consistent_rms
        if wanted is None:  # Of a polar factor, times Jordan's factor.
            wanted = 1 / math.sqrt(math.prod(u.shape[axis] for axis in axes.row))
        matrix = axes.row + axes.col
        rms = jnp.expand_dims(jnp.sqrt(jnp.mean(square(u), matrix)), matrix)
        scale = jnp.asarray(wanted, rms.dtype) / jnp.where(rms == 0, 1, rms)
        return u * scale.astype(u.dtype)


def matrix_transform(
    *,
    b1: ArrayLike,
    b2: ArrayLike,
    nesterov: bool,
    factoring: FactoringRule,
    mu_dtype: MuDtype,
    orthogonalize: optax.GradientTransformation,
    consistent_rms: ArrayLike | None,
) -> MatrixTransform:
    """Returns what is done to a tree of hidden matrices.

    Raises:
      ValueError: a hyperparameter is out of range.
      TypeError: one is no number.
    """
    check_decay("b1", b1)
    check_decay("b2", b2)
    check_flag("nesterov", nesterov)
    check_threshold("consistent_rms", consistent_rms)
    momentum = LeafTransform(
        "came_muon",
        QuantizedEmaState,
        Hyperparameters(b1=b1, nesterov=nesterov),
        bias_correction=True,
        factoring=factoring,
        mu_dtype=dtype_name(mu_dtype),
    )
    moment = LeafTransform(
        "came_muon",
        _MomentState,
        Hyperparameters(b2=b2, clip=None),
        bias_correction=False,  # All is scaled in the end.
        factoring=factoring,
    )
    return MatrixTransform(momentum, orthogonalize, moment, consistent_rms)

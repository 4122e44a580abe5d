"""The second half of CAME: momentum, and confidence in it."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from came_optax import _momentum as momentum
from came_optax import _statistics as stats
from came_optax._boxes import unboxed
from came_optax._checks import (
    KeyPath,
    check_decay,
    check_epsilon,
    check_flag,
    check_inexact,
    check_same_leaves,
    check_state,
)
from came_optax._clipping import clipped_by_leaf_rms
from came_optax._factoring import (
    FactoredAxes,
    FactoringRule,
    LastTwoAxes,
    check_factoring,
    factored_axes,
)
from came_optax._residual import average, residuals


class ScaleByConfidenceState(NamedTuple):
    """State of :func:`scale_by_confidence`.

    The trees have the parameters' structure. Statistics are float32 (float64 for
    float64 and complex128 parameters); a leaf holds zeros of shape (1,) for what it
    lacks.

    Attributes:
      count: number of updates so far; shape (), int32.
      mu: first moment of the updates; the leaf's shape, in the dtype that
        ``mu_dtype`` says. With ``"int4"``, uint8 bytes of two neighbours along the
        first axis of even size, or of two rows 8 apart where rows are many and odd.
      mu_row: largest magnitude in each row of a quantized first moment; the leaf's
        shape without ``col`` axes.
      mu_col: largest magnitude in each column of a quantized first moment; the leaf's
        shape without ``row`` axes.
      s_row: factored leaves: mean of the instability ``|u − m|²`` over ``col`` axes;
        the leaf's shape without them.
      s_col: factored leaves: mean of the instability over ``row`` axes; the leaf's
        shape without them.
    """

    count: jax.typing.ArrayLike  # type: ignore[assignment]  # hides tuple.count
    mu: optax.Updates
    mu_row: optax.Updates
    mu_col: optax.Updates
    s_row: optax.Updates
    s_col: optax.Updates


def scale_by_confidence(
    b1: jax.typing.ArrayLike = 0.9,
    b3: jax.typing.ArrayLike = 0.9999,
    eps2: jax.typing.ArrayLike = 1e-16,
    *,
    factoring: FactoringRule = LastTwoAxes(),
    mu_dtype: str = "float32",
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
      mu_dtype: how momentum is stored between steps: ``"float32"`` (float64 for
        float64 parameters), ``"bfloat16"``, ``"int8"`` or ``"int4"``. The step that
        stores it uses the unrounded momentum. Integers are codes with a scale for each
        row and column; leaves of fewer than 4096 elements stay float32, and complex
        momentum complex.
      bias_correction: divide the instability by :math:`1 - \beta_3^t` and the momentum
        in the update by :math:`1 - \beta_1^t`. The residual :math:`u - m` keeps the
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
    return clipped_confidence(
        b1,
        b3,
        eps2,
        None,
        factoring=factoring,
        mu_dtype=mu_dtype,
        bias_correction=bias_correction,
    )


def clipped_confidence(
    b1: jax.typing.ArrayLike,
    b3: jax.typing.ArrayLike,
    eps2: jax.typing.ArrayLike,
    clipping_threshold: jax.typing.ArrayLike | None,
    *,
    factoring: FactoringRule,
    mu_dtype: str,
    bias_correction: bool,
) -> optax.GradientTransformationExtraArgs:
    """:func:`scale_by_confidence`, then each leaf clipped by its RMS."""
    check_decay("b1", b1)
    check_decay("b3", b3)
    check_epsilon("eps2", eps2)
    check_flag("bias_correction", bias_correction)
    check_factoring(factoring)
    momentum.check_dtype(mu_dtype)
    b1, b3 = jnp.asarray(b1, jnp.float32), jnp.asarray(b3, jnp.float32)
    eps2 = jnp.asarray(eps2, jnp.float32)

    def init_fn(params: optax.Params) -> ScaleByConfidenceState:
        def init_leaf(p: Any, axes: FactoredAxes) -> _Leaf:
            row_mean, col_mean, _ = stats.reductions(axes)
            return _Leaf(
                momentum.init(p, axes, mu_dtype),
                stats.init_statistic(p, row_mean),
                stats.init_statistic(p, col_mean),
            )

        check_inexact("params", params)
        leaves = jax.tree.map(init_leaf, params, factored_axes(factoring, params))
        return _to_state(jnp.zeros([], jnp.int32), leaves)

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ScaleByConfidenceState]:
        del params, extra_args
        check_state(state, ScaleByConfidenceState, "scale_by_confidence")
        check_inexact("updates", updates)
        check_same_leaves("updates", updates, "state", state.mu)
        count = optax.safe_increment(state.count)
        turn = jnp.array(False)

        def update_leaf(
            path: KeyPath,
            u: jax.Array,
            axes: FactoredAxes,
            mu: jax.Array,
            mu_row: jax.Array,
            mu_col: jax.Array,
            s_row: jax.Array,
            s_col: jax.Array,
        ) -> _Leaf:
            nonlocal turn
            row_mean, col_mean, _ = stats.reductions(axes)
            stats.check_statistic("s_row", path, s_row, u.shape, row_mean)
            stats.check_statistic("s_col", path, s_col, u.shape, col_mean)
            x = stats.in_precision_of(s_row, u)
            stored = momentum.Stored(mu, mu_row, mu_col)
            momentum.check(path, stored, x, axes, mu_dtype)
            stored, s_row, s_col, delta, turn = _update_leaf(
                x,
                stored,
                s_row,
                s_col,
                count if bias_correction else None,
                turn,
                b1=b1,
                b3=b3,
                eps2=eps2,
                clipping_threshold=clipping_threshold,
                axes=axes,
                mu_dtype=mu_dtype,
            )
            return _Leaf(stored, s_row, s_col, delta.astype(u.dtype))

        leaves = jax.tree.map_with_path(
            update_leaf,
            updates,
            factored_axes(factoring, updates),
            state.mu,
            state.mu_row,
            state.mu_col,
            state.s_row,
            state.s_col,
        )
        return jax.tree.map(lambda leaf: leaf.delta, leaves), _to_state(count, leaves)

    return unboxed(optax.GradientTransformationExtraArgs(init_fn, update_fn))


# Inlined, as XLA:GPU fuses what was a call differently, and moves more memory.
@functools.partial(jax.jit, static_argnames=("axes", "mu_dtype"), inline=True)
def _update_leaf(
    u: jax.Array,
    stored: momentum.Stored,
    s_row: jax.Array,
    s_col: jax.Array,
    count: jax.Array | None,
    turn: jax.Array,
    *,
    b1: jax.Array,
    b3: jax.Array,
    eps2: jax.Array,
    clipping_threshold: jax.typing.ArrayLike | None,
    axes: FactoredAxes,
    mu_dtype: str,
) -> tuple[momentum.Stored, jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns one leaf's state, update and turn; traced once for each shape.

    Args:
      u: the update, in the statistics' precision.
      stored: the momentum.
      s_row: the row statistic; shape (1,) if the leaf isn't factored.
      s_col: the column statistic; shape (1,) if the leaf isn't factored.
      count: number of updates with this one, or None for no bias correction.
      turn: what this function returned for the leaf before.
      b1: decay rate of the momentum.
      b3: decay rate of the instability.
      eps2: added to the instability.
      clipping_threshold: largest root mean square of the result, or None.
      axes: the leaf's axes.
      mu_dtype: how momentum is stored.
    """
    old_m = momentum.load(stored, u, axes, mu_dtype)
    if axes.factored:
        u = stats.in_turn(u, turn)
        residual = residuals(old_m, u, b1, momentum.is_quantized(u, mu_dtype))
        s_row = stats.update_mean_square(
            s_row, residual.for_row, axes.col, b3, eps2, residual.factor
        )
        s_col = stats.update_mean_square(
            s_col, residual.for_col, axes.row, b3, eps2, residual.factor
        )
        turn = stats.turn_after(s_row, s_col)
        m = average(old_m, u, b1, residual.for_col, turn)
    else:
        m = stats.moving_average(old_m, u, b1)

    def confident(m: jax.Array, *s: jax.Array) -> jax.Array:
        delta = stats.divide_by_root(m, s, axes) if axes.factored else m
        if count is not None:  # delta is of order m s^(-1/2).
            scale = 1 / stats.one_minus_power(b1, count)
            if axes.factored:
                scale *= jnp.sqrt(stats.one_minus_power(b3, count))
            delta = delta * scale.astype(delta.dtype)
        return delta

    instability = (s_row, s_col) if axes.factored else ()
    delta = clipped_by_leaf_rms(confident, (m, *instability), axes, clipping_threshold)
    stored = momentum.store(m, old_m, u, b1, stored, axes, mu_dtype)
    if axes.factored:
        turn = stats.turn_after(s_row, stored.mu_row)
    return stored, s_row, s_col, delta, turn


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """One leaf's new state and update; opaque to ``jax.tree.map``."""

    stored: momentum.Stored
    s_row: jax.Array
    s_col: jax.Array
    delta: jax.Array | None = None


def _to_state(count: jax.typing.ArrayLike, leaves: Any) -> ScaleByConfidenceState:
    return ScaleByConfidenceState(
        count=count,
        mu=jax.tree.map(lambda leaf: leaf.stored.mu, leaves),
        mu_row=jax.tree.map(lambda leaf: leaf.stored.mu_row, leaves),
        mu_col=jax.tree.map(lambda leaf: leaf.stored.mu_col, leaves),
        s_row=jax.tree.map(lambda leaf: leaf.s_row, leaves),
        s_col=jax.tree.map(lambda leaf: leaf.s_col, leaves),
    )

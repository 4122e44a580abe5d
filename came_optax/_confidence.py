"""The second half of CAME: momentum, and confidence in it."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from came_optax import _momentum as momentum
from came_optax import _statistics as stats
from came_optax._checks import KeyPath, check_decay, check_epsilon, check_flag
from came_optax._clipping import clipped_by_leaf_rms
from came_optax._factoring import FactoredAxes, FactoringRule, LastTwoAxes
from came_optax._leafwise import Leafwise, transformation
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
      mu_dtype: how momentum is stored between steps: ``"float32"`` (float64 for
        float64 parameters), ``"bfloat16"``, ``"int8"`` or ``"int4"``. The step that
        stores it uses the unrounded momentum. Integers are codes with a scale for each
        row and column; leaves of fewer than 4096 elements stay float32, and complex
        momentum complex.
      nesterov: look one step ahead: the update takes
        :math:`\beta_1 m + (1 - \beta_1) u` for :math:`m`.
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
    part = confidence(
        b1,
        b3,
        eps2,
        None,
        mu_dtype=mu_dtype,
        nesterov=nesterov,
        bias_correction=bias_correction,
    )
    return transformation(part, factoring)


def confidence(
    b1: jax.typing.ArrayLike,
    b3: jax.typing.ArrayLike,
    eps2: jax.typing.ArrayLike,
    clipping_threshold: jax.typing.ArrayLike | None,
    *,
    mu_dtype: str,
    nesterov: bool,
    bias_correction: bool,
) -> Leafwise:
    """:func:`scale_by_confidence`, then a clip by RMS, of each leaf."""
    check_decay("b1", b1)
    check_decay("b3", b3)
    check_epsilon("eps2", eps2)
    check_flag("nesterov", nesterov)
    check_flag("bias_correction", bias_correction)
    momentum.check_dtype(mu_dtype)
    b1, b3 = jnp.asarray(b1, jnp.float32), jnp.asarray(b3, jnp.float32)
    eps2 = jnp.asarray(eps2, jnp.float32)

    def init(p: Any, axes: FactoredAxes) -> tuple[jax.Array, ...]:
        row_mean, col_mean, _ = stats.reductions(axes)
        return (
            *momentum.init(p, axes, mu_dtype),
            stats.init_statistic(p, row_mean),
            stats.init_statistic(p, col_mean),
        )

    def update(
        path: KeyPath,
        u: jax.Array,
        arrays: tuple[jax.Array, ...],
        axes: FactoredAxes,
        count: jax.Array,
        turn: jax.Array,
    ) -> tuple[jax.Array, tuple[jax.Array, ...], jax.Array]:
        *stored, s_row, s_col = arrays
        row_mean, col_mean, _ = stats.reductions(axes)
        stats.check_statistic("s_row", path, s_row, u.shape, row_mean)
        stats.check_statistic("s_col", path, s_col, u.shape, col_mean)
        x = stats.in_precision_of(s_row, u)
        momentum.check(path, momentum.Stored(*stored), x, axes, mu_dtype)
        delta, stored, s_row, s_col, turn = _update_leaf(
            x,
            momentum.Stored(*stored),
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
            nesterov=nesterov,
        )
        return delta.astype(u.dtype), (*stored, s_row, s_col), turn

    return Leafwise("scale_by_confidence", ScaleByConfidenceState, init, update)


# Inlined, as XLA:GPU fuses what was a call differently, and moves more memory.
@functools.partial(
    jax.jit, static_argnames=("axes", "mu_dtype", "nesterov"), inline=True
)
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
    nesterov: bool,
) -> tuple[jax.Array, momentum.Stored, jax.Array, jax.Array, jax.Array]:
    """Returns one leaf's update, state and turn; traced once for each shape.

    Args:
      u: the update, in the statistics' precision.
      stored: the momentum.
      s_row: the row statistic; shape (1,) if the leaf isn't factored.
      s_col: the column statistic; shape (1,) if the leaf isn't factored.
      count: number of updates with this one, or None for no bias correction.
      turn: the turn before.
      b1: decay rate of the momentum.
      b3: decay rate of the instability.
      eps2: added to the instability.
      clipping_threshold: largest root mean square of the result, or None.
      axes: the leaf's axes.
      mu_dtype: how momentum is stored.
      nesterov: whether the update looks one step ahead.
    """
    if axes.factored and momentum.is_quantized(u, mu_dtype):
        # Not before the leaf's second moment: all leaves' codes would be too many.
        stored = stored._replace(mu=stats.read_once(stored.mu, turn))
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

    def confident(m: jax.Array, u: jax.Array, *s: jax.Array) -> jax.Array:
        of_m, of_u = (b1, 1 - b1) if nesterov else (jnp.ones_like(b1), b1)
        if count is not None:
            of_m = of_m / stats.one_minus_power(b1, count + int(nesterov))
            of_u = of_u / stats.one_minus_power(b1, count)
        delta = of_m.astype(m.dtype) * m
        if nesterov:
            delta += of_u.astype(m.dtype) * u
        if axes.factored:
            # Without momentum u - m is 0, and says nothing.
            s = tuple(jnp.where(b1 > 0, x, 1) for x in s)
            delta = stats.divide_by_root(delta, s, axes)
            if count is not None:
                scale = jnp.sqrt(stats.one_minus_power(b3, count))
                delta *= jnp.where(b1 > 0, scale, 1).astype(delta.dtype)
        return delta

    instability = (s_row, s_col) if axes.factored else ()
    delta = clipped_by_leaf_rms(
        confident, (m, u, *instability), axes, clipping_threshold
    )
    stored = momentum.store(m, old_m, u, b1, stored, axes, mu_dtype)
    if axes.factored:
        turn = stats.turn_after(s_row, stored.mu_row)
    return delta, stored, s_row, s_col, turn

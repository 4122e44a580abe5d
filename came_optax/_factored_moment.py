"""The first half of CAME: Adafactor's factored second moment."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from came_optax import _statistics as stats
from came_optax._checks import KeyPath, check_decay, check_epsilon, check_flag
from came_optax._clipping import clipped_by_leaf_rms
from came_optax._factoring import FactoredAxes, FactoringRule, LastTwoAxes
from came_optax._leafwise import Leafwise, transformation


class ScaleByFactoredMomentState(NamedTuple):
    """State of :func:`scale_by_factored_moment`.

    The trees have the parameters' structure. Arrays are float32 (float64 for float64
    and complex128 parameters); a leaf holds zeros of shape (1,) for what it lacks.

    Attributes:
      count: number of updates so far; shape (), int32.
      v_row: factored leaves: mean of ``|g|²`` over ``col`` axes; the leaf's shape
        without them.
      v_col: factored leaves: mean of ``|g|²`` over ``row`` axes; the leaf's shape
        without them.
      v: other leaves: ``|g|²``; the leaf's shape.
    """

    count: jax.typing.ArrayLike  # type: ignore[assignment]  # hides tuple.count
    v_row: optax.Updates
    v_col: optax.Updates
    v: optax.Updates


def scale_by_factored_moment(
    b2: jax.typing.ArrayLike = 0.999,
    eps1: jax.typing.ArrayLike = 1e-30,
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
    part = factored_moment(b2, eps1, None, bias_correction=bias_correction)
    return transformation(part, factoring)


def factored_moment(
    b2: jax.typing.ArrayLike,
    eps1: jax.typing.ArrayLike,
    clipping_threshold: jax.typing.ArrayLike | None,
    *,
    bias_correction: bool,
) -> Leafwise:
    """:func:`scale_by_factored_moment`, then a clip by RMS, of each leaf.

    As one, because XLA:CPU can compute the RMS from the gradient and the statistics
    without storing u, if it is told so.
    """
    check_decay("b2", b2)
    check_epsilon("eps1", eps1)
    check_flag("bias_correction", bias_correction)
    b2, eps1 = jnp.asarray(b2, jnp.float32), jnp.asarray(eps1, jnp.float32)

    def init(p: Any, axes: FactoredAxes) -> tuple[jax.Array, ...]:
        return tuple(stats.init_statistic(p, m) for m in stats.reductions(axes))

    def update(
        path: KeyPath,
        g: jax.Array,
        statistics: tuple[jax.Array, jax.Array, jax.Array],
        axes: FactoredAxes,
        count: jax.Array,
        turn: jax.Array,
    ) -> tuple[jax.Array, tuple[jax.Array, ...], jax.Array]:
        *_, v = statistics
        for name, statistic, mean_over in zip(
            ("v_row", "v_col", "v"), statistics, stats.reductions(axes), strict=True
        ):
            stats.check_statistic(name, path, statistic, g.shape, mean_over)
        u, statistics, turn = _update_leaf(
            stats.in_precision_of(v, g),
            *statistics,
            count if bias_correction else None,
            turn,
            b2=b2,
            eps1=eps1,
            clipping_threshold=clipping_threshold,
            axes=axes,
        )
        return u.astype(g.dtype), statistics, turn

    return Leafwise(
        "scale_by_factored_moment", ScaleByFactoredMomentState, init, update
    )


# Inlined, as XLA:GPU fuses what was a call differently, and moves more memory.
@functools.partial(jax.jit, static_argnames="axes", inline=True)
def _update_leaf(
    g: jax.Array,
    v_row: jax.Array,
    v_col: jax.Array,
    v: jax.Array,
    count: jax.Array | None,
    turn: jax.Array,
    *,
    b2: jax.Array,
    eps1: jax.Array,
    clipping_threshold: jax.typing.ArrayLike | None,
    axes: FactoredAxes,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array], jax.Array]:
    """Returns one leaf's update, statistics and turn; traced once for each shape.

    Args:
      g: the gradient, in the statistics' precision.
      v_row: its row statistic; shape (1,) if the leaf isn't factored.
      v_col: its column statistic; shape (1,) if the leaf isn't factored.
      v: its second moment; shape (1,) if the leaf is factored.
      count: number of updates with this one, or None for no bias correction.
      turn: the turn before.
      b2: decay rate.
      eps1: added to the squared gradient.
      clipping_threshold: largest root mean square of the update, or None.
      axes: the leaf's axes.
    """
    if axes.factored:
        g = stats.read_once(g, v[0] < 0)
        decay = stats.in_turn(b2, turn)
        v_row = stats.update_mean_square(v_row, g, axes.col, decay, eps1)
        # A factor, as XLA:CPU would store what a select makes of g.
        one = stats.in_turn(jnp.ones([], g.dtype), turn)
        again = one * stats.for_another_pass(g)
        v_col = stats.update_mean_square(v_col, again, axes.row, decay, eps1)
        turn = stats.turn_after(stats.mean_of_row(v_row, axes))
    else:
        v = stats.update_mean_square(v, g, (), b2, eps1)

    def normalized(g: jax.Array, *v: jax.Array) -> jax.Array:
        u = stats.divide_by_root(g, v, axes)
        if count is not None:  # u is of order v^(-1/2).
            u = u * jnp.sqrt(stats.one_minus_power(b2, count)).astype(u.dtype)
        return u

    moments = (v_row, v_col) if axes.factored else (v,)
    u = clipped_by_leaf_rms(normalized, (g, *moments), axes, clipping_threshold)
    return u, (v_row, v_col, v), turn

"""One leaf of the state: what it holds, how it starts, and its update."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from came_optax import _momentum as momentum
from came_optax import _schedules as schedules
from came_optax._algorithm import Factored, Hyperparameters, Seen
from came_optax._arrays import check_array, kept_shape, zeros
from came_optax._codes import Codes
from came_optax._factored_axes import FactoredAxes
from came_optax._momentum import Stored
from came_optax._paths import KeyPath


class Leaf(NamedTuple):
    """The arrays of one leaf; None for what its transformation doesn't keep.

    The fields are those of the public states, which say what they are. The first half
    of the algorithm is done if there is a ``v_row``, the second if there is a ``mu``,
    with confidence if there is an ``s_row``.
    """

    v_row: jax.Array | None = None
    v_col: jax.Array | None = None
    v: jax.Array | None = None
    mu: Stored | None = None
    s_row: jax.Array | None = None
    s_col: jax.Array | None = None


def _means(axes: FactoredAxes) -> dict[str, tuple[int, ...] | None]:
    """Returns the axes that each statistic is a mean over; None if a leaf lacks it."""
    row, col, whole = (axes.col, axes.row, None) if axes.factored else (None, None, ())
    return {"v_row": row, "v_col": col, "v": whole, "s_row": row, "s_col": col}


def init(p: Any, axes: FactoredAxes, mu_dtype: str, fields: tuple[str, ...]) -> Leaf:
    """Returns the zeros that a parameter's state starts with, in some fields."""
    means = _means(axes)
    statistics = {name: zeros(p, means[name]) for name in fields if name in means}
    mu = momentum.init(p, axes, mu_dtype) if "mu" in fields else None
    return Leaf(mu=mu, **statistics)


def arithmetic_dtype(leaf: Leaf) -> Any:
    """Returns float32 or float64: that of the state, whatever the gradient's."""
    wide = (jnp.float64, jnp.complex128)
    is_wide = any(x.dtype in wide for x in jax.tree.leaves(leaf))
    return jnp.float64 if is_wide else jnp.float32


def upcast(g: Any, dtype: Any) -> jax.Array:
    """Returns a gradient, real or complex, in arithmetic of a real dtype."""
    if jnp.iscomplexobj(g):
        dtype = jnp.complex128 if dtype == jnp.float64 else jnp.complex64
    return jnp.asarray(g).astype(dtype)


def check(
    path: KeyPath, g: jax.Array, leaf: Leaf, axes: FactoredAxes, mu_dtype: str
) -> None:
    """Raises unless ``init`` makes such arrays for a gradient that was upcast.

    Raises:
      TypeError: not of such dtypes.
      ValueError: not of such shapes.
    """
    means = _means(axes)
    for name, x in leaf._asdict().items():
        if name == "mu" and x is not None:
            momentum.check(path, x, g, axes, mu_dtype)
        elif x is not None:
            shape, dtypes = kept_shape(g.shape, means[name]), (jnp.float32, jnp.float64)
            check_array(name, path, x, shape, dtypes, g, "this factoring")


def next_token(leaf: Leaf, token: jax.Array) -> jax.Array:
    """Returns a number ≥ 0, shape (), that is known once the momentum can be stored.

    Where momentum is stored as it is computed, it is the token of the leaf before.
    """
    mu, last = leaf.mu, None
    if isinstance(mu, Codes):
        last = mu.row_scale
    elif mu is not None and mu.dtype == jnp.bfloat16:
        last = leaf.s_row
    return token if last is None else jnp.mean(last.astype(token.dtype))


def cast_hyperparameters(h: Hyperparameters, dtype: Any) -> Hyperparameters:
    """Returns them as arrays; until now Python numbers still are that."""
    cast: Hyperparameters = jax.tree.map(
        lambda x: x.astype(dtype) if isinstance(x, jax.Array) else np.asarray(x, dtype),
        h,
    )
    return cast


# Inlined, as XLA:GPU fuses what was a call differently, and moves more memory. Traced
# once for each shape, and for other schedules anew.
@functools.partial(jax.jit, static_argnames=("axes", "by_platform"), inline=True)
def update(
    g: jax.Array,
    leaf: Leaf,
    h: Hyperparameters,
    seen: Seen | None,
    count: jax.Array,
    token: jax.Array,
    *,
    axes: FactoredAxes,
    by_platform: Any,
) -> tuple[jax.Array, Leaf]:
    """Returns a leaf's update and new arrays, by the schedule of whoever runs it.

    Args:
      g: the gradient, upcast.
      leaf: the arrays.
      h: hyperparameters in the dtype of the arithmetic.
      seen: what averages have seen, for bias correction.
      count: number of updates with this one.
      token: the :func:`next_token` of the leaf before.
      axes: the leaf's.
      by_platform: pairs of a platform and its schedule.
    """

    def by(schedule: schedules.Schedule) -> Any:
        return functools.partial(_by_schedule, schedule, axes=axes)

    branches = {platform: by(schedule) for platform, schedule in by_platform}
    # Real numbers scale complex leaves.
    with jax.numpy_dtype_promotion("standard"):
        new: tuple[jax.Array, Leaf] = jax.lax.platform_dependent(
            *(g, leaf, h, seen, count, token), **branches, default=by(schedules.PLAIN)
        )
    return new


def _by_schedule(
    schedule: schedules.Schedule,
    g: jax.Array,
    leaf: Leaf,
    h: Hyperparameters,
    seen: Seen | None,
    count: jax.Array,
    token: jax.Array,
    *,
    axes: FactoredAxes,
) -> tuple[jax.Array, Leaf]:
    """Does both halves of the algorithm, or the one whose arrays there are."""

    def u() -> jax.Array:
        return g

    if leaf.v_row is not None:
        factored = _factored(leaf.v_row, leaf.v_col) if axes.factored else None
        u, v = schedule.normalize(g, factored or leaf.v, h, axes, seen)
        new = {"v_row": v.row, "v_col": v.col} if axes.factored else {"v": v}
        leaf = leaf._replace(**new)
    mu = leaf.mu
    if mu is None:
        return u(), leaf
    delta, new_mu, s = schedule.confide(
        u,
        mu,
        _factored(leaf.s_row, leaf.s_col) if axes.factored else None,
        h,
        axes,
        seen,
        momentum.Storage(g, axes, count),
        token,
    )
    leaf = leaf._replace(mu=new_mu)
    return delta, leaf if s is None else leaf._replace(s_row=s.row, s_col=s.col)


def _factored(row: jax.Array | None, col: jax.Array | None) -> Factored | None:
    return None if row is None or col is None else Factored(row, col)

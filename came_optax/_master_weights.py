"""Weights in bfloat16 or float16, and in the state what float32 has more."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from came_optax import _boxes as boxes
from came_optax._arrays import check_array
from came_optax._checks import check_params, check_same_leaves, check_state, is_int
from came_optax._paths import KeyPath, path_name
from came_optax._weight_bits import (
    DOWN,
    REMAINDER,
    cut,
    is_narrow,
    join,
    lacking,
    nearest,
    split,
    thresholds,
    upcast,
)


class MasterWeightsState(NamedTuple):
    """State of :func:`with_master_weights`.

    Attributes:
      count: number of updates so far; shape (), int32.
      remainder: what the parameters lack of the weights, structured like them: int8 or
        int16 of the parameter's shape, in units of a weight's last bit; zeros of shape
        (1,) for what lacks nothing.
      inner_state: state of the wrapped transformation, for the weights.
    """

    count: ArrayLike  # type: ignore[assignment]  # hides tuple.count
    remainder: optax.Params
    inner_state: optax.OptState


class _Remainder(NamedTuple):
    remainder: optax.Params


def with_master_weights(
    tx: optax.GradientTransformation, bits: int = 24
) -> optax.GradientTransformationExtraArgs:
    r"""Trains bfloat16 parameters like float32 ones; what they lack is in the state.

    A bfloat16 number near 1 is 1/128 from the next: steps of less than half of that are
    lost, however often they are taken. Here ``tx`` sees gradients and weights :math:`w`
    in float32, and

    .. math::

        w &\leftarrow w + \Delta \\
        \theta &\leftarrow \operatorname{bfloat16}(w), \quad \rho = w - \theta

    where the remainder :math:`\rho` is what the state keeps. The updates, in float32,
    are the differences of :math:`\theta`: ``optax.apply_updates``, ``nnx.Optimizer``
    and ``TrainState.apply_gradients`` land on it, as they cast after adding. Leaves
    that are neither bfloat16 nor float16 are left to ``tx`` as they are.

    What else is done to parameters counts. A remainder is at most half the distance to
    the next bfloat16 number, so that an old one does no more to a parameter that was
    loaded, cast or averaged than its rounding did.

    Args:
      tx: the optimizer, with learning rate and weight decay. Gradients that
        ``optax.MultiSteps`` accumulates reach it in float32 if that is inside, but
        rounded to the parameters' dtype if that is around this.
      bits: of a weight. 32 is float32 to the last bit, on 2 bytes of state a
        parameter. 24 takes 1 byte, and 16 none: weights are then rounded up at some
        steps and down at others, and are exact on average.

    Returns:
      A transformation with state :class:`MasterWeightsState`. ``update`` needs
      ``params``, and what it returns must be applied as it is: in a chain it is last,
      and ``optax.apply_if_finite`` goes around ``tx``.

    Raises:
      ValueError: ``bits`` is another number, or there are no ``params``.
      TypeError: a state that another transformation made, or parameters that were cast.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from came_optax import master_weights, steady_came, with_master_weights
      >>> params = {"scale": jnp.ones(1000, jnp.bfloat16)}
      >>> tx = with_master_weights(steady_came(1e-4, mu_dtype="int8"))
      >>> state = tx.init(params)
      >>> for _ in range(10):
      ...     updates, state = tx.update(params, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> float(params["scale"].max())
      1.0
      >>> bool(abs(master_weights(params, state)["scale"].mean() - 0.999) < 1e-4)
      True

    Note:
      With 32 bits every float32 has its bfloat16 and remainder, and steps are exact
      where a float32 sum can lead from one parameter to the other. It can't: away from
      infinity, which is the bfloat16 of more than 3.39e38; by a subnormal difference,
      for magnitudes below 1.5e-36, where sums of those are flushed to 0, as on CPUs and
      TPUs; from just below a power of two to less than 2⁻¹⁵ of it beyond 0, where the
      weight may be off by the step's last bit; by more than float32's largest number,
      to which the update is clipped. In float16 magnitudes from 2⁻¹⁷ to 65,520 are
      exact, and smaller ones multiples of 2⁻⁴⁰.

      A step's error is below 2⁻¹⁵ of the weight with 24 bits (in float16 2⁻¹⁸), and
      2⁻⁷ with 16 (2⁻¹⁰); its mean is 0.

    References:
      Micikevicius et al., `Mixed precision training
      <https://arxiv.org/abs/1710.03740>`_, 2018; Zamirai et al., `Revisiting bfloat16
      training <https://arxiv.org/abs/2010.06192>`_, 2020; Gupta et al., `Deep learning
      with limited numerical precision <https://arxiv.org/abs/1502.02551>`_, 2015.
    """
    _check_bits(bits)
    tx = optax.with_extra_args_support(tx)

    def init_fn(params: optax.Params) -> MasterWeightsState:
        def init_remainder(arrays: optax.Params) -> _Remainder:
            return _Remainder(
                jax.tree.map(
                    lambda p: split(upcast(p, p), p.dtype, bits, DOWN)[1],
                    arrays,
                )
            )

        jax.tree.map_with_path(_check_is_array, boxes.unbox(params))
        remainder = boxes.box_state(params, init_remainder).remainder
        inner_state = tx.init(jax.tree.map(upcast, params, params))
        return MasterWeightsState(jnp.zeros([], jnp.int32), remainder, inner_state)

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, MasterWeightsState]:
        check_state(state, MasterWeightsState, "with_master_weights")
        if params is None:
            raise ValueError(
                "with_master_weights needs the parameters: call update(grads, state, "
                "params); you are not passing `params`"
            )
        arrays, remainder = boxes.unbox(params), boxes.unbox(state.remainder)
        jax.tree.map_with_path(_check_is_array, arrays)
        check_params(arrays, boxes.unbox(updates))
        check_same_leaves("params", arrays, "state", remainder)
        jax.tree.map_with_path(functools.partial(_check, bits), arrays, remainder)
        weights = jax.tree.map(join, arrays, remainder)
        gradients = jax.tree.map(upcast, boxes.unbox(updates), arrays)
        steps, inner_state = tx.update(
            boxes.box_like(updates, gradients),
            state.inner_state,
            boxes.box_like(params, weights),
            **extra_args,
        )
        count: Any = optax.safe_increment(state.count)
        leaves = [
            _step(bits, count, *leaf)
            for leaf in zip(
                *map(jax.tree.leaves, (arrays, weights, steps)), strict=True
            )
        ]
        changes, remainder = ([leaf[i] for leaf in leaves] for i in (0, 1))
        return boxes.box_like(updates, changes), MasterWeightsState(
            count, boxes.box_like(state.remainder, remainder), inner_state
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def master_weights(params: optax.Params, state: optax.OptState) -> optax.Params:
    """Returns the weights in float32, for evaluation, averages and checkpoints.

    Args:
      params: the parameters.
      state: of :func:`with_master_weights`, or of what that is part of, such as a
        chain, ``optax.masked`` or ``optax.partition``.

    Returns:
      The parameters with their remainders; those without one are as they are.

    Raises:
      KeyError: there are no remainders in ``state``, or several of one parameter.
    """

    def is_of_weights(x: Any) -> bool:
        return isinstance(x, MasterWeightsState)

    states = filter(is_of_weights, jax.tree.leaves(state, is_leaf=is_of_weights))
    remainders = [boxes.unbox(boxes.open_empty(s.remainder)) for s in states]
    if not remainders:
        raise KeyError("there is no state of with_master_weights in the state")

    def whole(path: KeyPath, p: Any, *of_states: Any) -> Any:
        own = [r for r in of_states if not isinstance(r, optax.MaskedNode)]
        if len(own) > 1:
            raise KeyError(f"the state has several remainders of {path_name(path)!r}")
        return join(p, *own) if own else p

    arrays = boxes.unbox(params)
    weights = jax.tree.map_with_path(whole, arrays, *remainders)
    joined: optax.Params = boxes.box_like(params, weights)
    return joined


def split_weights(
    weights: optax.Params, bits: int = 24, dtype: Any = jnp.bfloat16
) -> tuple[optax.Params, optax.Params]:
    """Returns parameters of float32 weights, and the remainders that go with them.

    A weight half way between two parameters becomes the larger one, where a cast takes
    the even one: these remainders are those of these parameters, not of cast ones.

    Args:
      weights: a tree of arrays. Those that aren't float32 stay as they are.
      bits: as for :func:`with_master_weights`; to 24 and 16 the weights are rounded to
        the nearest.
      dtype: of the parameters, bfloat16 or float16, or its name.

    Returns:
      The parameters, and what is ``remainder`` in a :class:`MasterWeightsState`.

    Raises:
      ValueError: ``bits`` or ``dtype`` is something else.
      TypeError: a leaf is no array.

    Example:
      A job that trained float32 weights with ``tx`` goes on to the last bit:

      >>> import jax.numpy as jnp, optax
      >>> from came_optax import MasterWeightsState, split_weights, with_master_weights
      >>> weights, tx = {"w": jnp.full(3, 0.3)}, optax.adam(1e-3)
      >>> _, inner_state = tx.update(weights, tx.init(weights), weights)
      >>> params, remainder = split_weights(weights, bits=32)
      >>> state = MasterWeightsState(jnp.zeros([], jnp.int32), remainder, inner_state)
      >>> tx = with_master_weights(tx, bits=32)
      >>> updates, state = tx.update(params, state, params)
    """
    _check_bits(bits)
    if dtype not in (jnp.bfloat16, jnp.float16, "bfloat16", "float16"):
        raise ValueError(f"dtype must be bfloat16 or float16, got {dtype!r}")
    half_a_unit = np.uint32(2 ** (32 - bits) // 2)
    arrays = boxes.unbox(weights)
    jax.tree.map_with_path(_check_is_array, arrays)

    def halves(w: Any) -> tuple[jax.Array, jax.Array]:
        of_param = jnp.dtype(dtype) if w.dtype == jnp.float32 else w.dtype
        return split(upcast(w, w), of_param, bits, half_a_unit)

    def remainder(arrays: optax.Params) -> _Remainder:
        return _Remainder(jax.tree.map(lambda w: halves(w)[1], arrays))

    params = jax.tree.map(lambda w: halves(w)[0], arrays)
    boxed = boxes.box_state(weights, remainder)
    return boxes.box_like(weights, params), boxed.remainder


def _check_is_array(path: KeyPath, x: Any) -> None:
    if not (hasattr(x, "dtype") and hasattr(x, "shape")):
        raise TypeError(f"leaf {path_name(path)!r} is {x!r}, not an array")


def _check_bits(bits: Any) -> None:
    if not is_int(bits) or bits not in REMAINDER:
        raise ValueError(f"bits must be 16, 24 or 32, got {bits!r}")


def _check(bits: int, path: KeyPath, p: Any, remainder: Any) -> None:
    """Raises unless a remainder is as ``init`` makes it for a parameter."""
    if not is_narrow(p) and remainder.shape == p.shape != (1,):
        raise TypeError(
            f"leaf {path_name(path)!r} of the params has dtype {p.dtype}, but there is "
            "a remainder of it: apply updates with optax.apply_updates, which casts "
            "sums to the parameters' dtype"
        )
    shape = p.shape if is_narrow(p) and bits > 16 else (1,)
    why = f"bits={bits}"
    check_array("remainder", path, remainder, shape, REMAINDER[bits], p, why)


def _step(
    bits: int, count: jax.Array, p: Any, weight: jax.Array, step: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the change of a parameter, and its new remainder."""
    if not is_narrow(p):
        return step, jnp.zeros((1,), REMAINDER[bits])
    weight = weight + step.astype(jnp.float32)
    magnitude = cut(weight, p.dtype, bits, thresholds(p, bits, count))
    new, old = nearest(weight, magnitude, p.dtype), p.astype(jnp.float32)
    change = new.astype(jnp.float32) - old
    largest = jnp.finfo(jnp.float32).max
    change = jnp.where(jnp.isfinite(new), jnp.clip(change, -largest, largest), change)
    change = jnp.where(new == p, 0, change)  # Infinity stays infinity.
    # Whoever applies the change computes this again. As the remainder follows from it,
    # XLA:TPU writes both in one pass, where it would take two.
    applied = (old + change).astype(p.dtype)
    return change, lacking(weight, magnitude, applied, bits)

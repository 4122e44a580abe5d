"""A running job's state as that of another optimizer."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from came_optax import _boxes as boxes
from came_optax._alignment import align, parts
from came_optax._arrays import RESIZED, has_axes_of
from came_optax._carrying import COUNTING, carry, given_hyperparameters
from came_optax._checks import difference
from came_optax._conversion_report import ConversionReport, names_of
from came_optax._kept_axes import kept_axes
from came_optax._leaf_conversion import KINDS, convert
from came_optax._paths import KeyPath, owner, path_name


def convert_state(
    state: optax.OptState,
    params: optax.Params,
    *,
    old: optax.GradientTransformation,
    new: optax.GradientTransformation,
    strict: bool = True,
) -> optax.OptState:
    r"""Returns the state of another optimizer that goes on where a job is.

    Each transformation of ``new`` takes over the state of the one of ``old`` that has
    its place, through ``chain``, ``masked``, ``partition``, ``MultiSteps``,
    ``inject_hyperparams`` and other wrappers. Of the transformations that a parameter
    passes, the first of each kind takes over from the first of that kind, the second
    from the second. What is stored as before is kept to the last bit, its sharding
    included. The rest is converted:

    - A CAME, one of its halves, or :func:`quantized_ema`, with another ``mu_dtype`` or
      ``factoring``: momentum is decoded and stored anew, statistics are those of their
      outer product.
    - ``optax.ema`` and :func:`quantized_ema`: into each other.
    - Adam to CAME: momentum is :math:`\mu / \sqrt{\nu}`, with a root mean square of at
      most 1, as CAME averages gradients over their root mean square; the second moment
      is means of :math:`\nu`; the instability is 1: no confidence yet. CAME's own count
      is 10⁷, as averages that did not start at zero must not be corrected: before
      some :math:`1 / (1 - \beta_2)` steps of Adam, the first of CAME's are too long.
      AdaMax has states of Adam's class that hold no second moment: don't convert them.
    - CAME to Adam: :math:`\nu` is the outer product of rows and columns, and
      :math:`\mu` is :math:`m \sqrt{\nu}`. Adam's own count is 10⁷.
    - To ``optax.contrib.muon`` and the hidden matrices of :func:`came_muon`: momentum
      is of gradients, as Adam's is; CAME's is :math:`m \sqrt{\nu}`. The second moment,
      of what is orthogonalised, begins anew.
    - From these: momentum is over a root mean square that each matrix has as a whole,
      as if gradients were noise.

    An injected hyperparameter goes on as it is in the state where ``old`` and ``new``
    give it the same value; where they don't, it is as ``new`` gives it.

    Args:
      state: the state. That of a Flax ``nnx.Optimizer`` is ``optimizer.opt_state``;
        ``nnx.update(new_optimizer.opt_state, nnx.state(converted))`` puts it back.
      params: the parameters, as ``old.init`` was given them.
      old: the optimizer that ``state`` is of.
      new: the optimizer that it is to be of.
      strict: raise if an array of ``state`` has no place in ``new``, or a part of
        ``new`` none in ``old``. Otherwise the former are dropped, and the latter are as
        ``new.init`` makes them. :func:`conversion_report` says which they are.

    Returns:
      A state of ``new``. Under ``jax.jit`` with ``out_shardings`` from
      :func:`state_sharding` it is made where it belongs.

    Raises:
      ValueError: ``state`` is not one of ``old``, or it cannot be carried over whole.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from came_optax import convert_state, steady_came
      >>> params = {"kernel": jnp.ones((64, 64))}
      >>> adamw, came = optax.adamw(1e-3), steady_came(1e-3, mu_dtype="int8")
      >>> _, state = adamw.update(params, adamw.init(params), params)
      >>> state = convert_state(state, params, old=adamw, new=came)
      >>> updates, state = came.update(params, state, params)
      >>> optax.tree.get(state, "mu")["kernel"].values.dtype
      dtype('int8')
    """
    converted: optax.OptState
    converted, report = _convert(state, params, old, new)
    if strict and (report.anew or report.dropped):
        raise ValueError(
            f"old and new differ: {_some('only new has', report.anew)}"
            f"{_some('only old has', report.dropped)}strict=False makes what only new "
            "has as new.init does, and drops what only old has"
        )
    return converted


def conversion_report(
    params: Any, *, old: optax.GradientTransformation, new: optax.GradientTransformation
) -> ConversionReport:
    """Says what :func:`convert_state` would do, before there is a state.

    Args:
      params: the parameters, as arrays or as ``jax.ShapeDtypeStruct``.
      old: the optimizer of a state.
      new: the optimizer that it is to become one of.

    Returns:
      What is kept, converted, made anew and dropped; the latter two with
      ``strict=False`` only.

    Raises:
      ValueError: as :func:`convert_state` does.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from came_optax import conversion_report, steady_came
      >>> params = {"kernel": jax.ShapeDtypeStruct((64, 64), jnp.float32)}
      >>> new = steady_came(optax.cosine_decay_schedule(1e-3, 1000))
      >>> print(conversion_report(params, old=optax.adamw(1e-3), new=new))
                 new state                          old state
      converted  ScaleByCameState at '0'      from  ScaleByAdamState at '0'
      anew       ScaleByScheduleState at '2'
      convert_state does this with strict=False only
    """
    reports: list[ConversionReport] = []

    def run(params: Any) -> Any:
        state, report = _convert(old.init(params), params, old, new)
        reports.append(report)
        return state

    jax.eval_shape(run, params)
    return reports[0]


def _convert(
    state: Any,
    params: Any,
    old: optax.GradientTransformation,
    new: optax.GradientTransformation,
) -> tuple[Any, ConversionReport]:
    """Returns the converted state, and what was done to it."""
    arrays = boxes.unbox(params)
    by_path = dict(jax.tree.leaves_with_path(arrays))
    shapes, old_kept = kept_axes(old.init, arrays)
    _, new_kept = kept_axes(new.init, arrays)
    boxed = new.init(params)
    state = jax.tree.map(_as_array, boxes.unbox(boxes.open_empty(state)))
    fresh = boxes.unbox(boxed)
    _check_state_of_old(state, shapes, fresh, by_path)
    old_parts = parts(state, old_kept, by_path)
    new_parts = parts(fresh, new_kept, by_path)
    in_state = dict(jax.tree.leaves_with_path(state))
    given_in_old = given_hyperparameters(old, arrays, in_state)
    carried: dict[KeyPath, Any] = {}
    used = set(given_in_old)
    kept: dict[str, str] = {}
    converted: dict[str, str] = {}
    sources_of = align(old_parts, new_parts, by_path, _family)
    for part, sources in zip(new_parts, sources_of, strict=True):
        if not sources:
            continue
        if part.kind in KINDS:
            made = dict(convert(part, sources, by_path))
        else:
            made = dict(carry(part, sources, by_path, given_in_old))
        origins = list(dict.fromkeys(sources.values()))
        taken = {
            source.path + path
            for source in origins
            for path in source.arrays
            if path in made or part.kind in (*KINDS, *COUNTING)
            if (param := owner(path, by_path)[0]) is None
            or sources.get(param) is source
        }
        same = {id(in_state[path]) for path in taken} >= set(map(id, made.values()))
        (kept if same else converted)[str(part)] = ", ".join(map(str, origins))
        carried |= {part.path + path: x for path, x in made.items()}
        used |= taken
    in_new = set(dict(jax.tree.leaves_with_path(fresh)))
    report = ConversionReport(
        kept,
        converted,
        anew=names_of(new_parts, in_new - set(carried), by_path),
        dropped=names_of(old_parts, set(in_state) - used, by_path),
    )
    placed: set[int] = set()

    def place(path: KeyPath, x: Any) -> Any:
        x = carried.get(path, x)
        # A count may go on in several places: one buffer can't be donated twice.
        x = jnp.copy(x) if id(x) in placed else x
        placed.add(id(x))
        return x

    new_state: Any = jax.tree.map_with_path(place, fresh)
    return boxes.box_like(boxed, new_state), report


def _as_array(x: Any) -> jax.Array:
    """Returns an array for a number that was put into a state by hand."""
    return x if isinstance(x, jax.Array) else jnp.asarray(x)


def _family(kind: type) -> Hashable:
    """Returns what parts must have in common to take each other's place."""
    if kind in KINDS:
        return KINDS[kind].family
    return "schedule" if kind in COUNTING else kind


def _some(what: str, names: Sequence[str]) -> str:
    """Returns the beginning of an error about the first few names, if there are any."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{what} {', '.join(names[:3])}{more}; " if names else ""


def _check_state_of_old(
    state: Any, shapes: Any, new: Any, params: Mapping[KeyPath, Any]
) -> None:
    """Raises unless a state is as ``old.init`` makes it."""
    if found := difference(state, shapes):
        hint = "" if difference(state, new) else "; it is one of new: are they swapped?"
        raise ValueError(f"state is not one of old: they {found}{hint}")

    def check(path: KeyPath, x: Any, like: Any) -> None:
        if x.shape == like.shape:
            return
        param, _ = owner(path, params)
        fits = param is None or has_axes_of(x.shape, params[param].shape)
        raise ValueError(
            f"state is not one of old: {path_name(path)!r} has shape {x.shape}, "
            f"and in old {like.shape}" + ("" if fits else f" ({RESIZED})")
        )

    jax.tree.map_with_path(check, state, shapes)

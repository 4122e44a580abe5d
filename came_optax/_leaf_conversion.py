"""How the states of moments are read and written, a parameter at a time."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import GetAttrKey

from came_optax import _momentum as momentum
from came_optax._alignment import Part, Viewer
from came_optax._arrays import real_dtype, wide_dtype
from came_optax._carrying import cast
from came_optax._codes import Codes
from came_optax._confidence import ScaleByConfidenceState
from came_optax._factored_axes import FactoredAxes
from came_optax._factored_moment import ScaleByFactoredMomentState
from came_optax._kept_axes import lost_axes
from came_optax._muon_update import CameMuonState
from came_optax._paths import KeyPath, Shape, owner
from came_optax._quantized_ema import QuantizedEmaState
from came_optax._scale_by_came import ScaleByCameState

_LONG_AGO = 10**7  # Updates, after which no average is corrected for its start.

Leaf: TypeAlias = dict[str, Any]  # What a state has for a parameter, by field.


class Moments(NamedTuple):
    """What a leaf's arrays say, however they are stored; None for what they don't.

    Attributes:
      m: the first moment: an average of gradients over their root mean square, or of
        whatever a plain average is given.
      v: the second moment of each element.
      s: the instability of each element.
      g: the first moment of gradients themselves.
    """

    m: Any = None
    v: Any = None
    s: Any = None
    g: Any = None


class Target(NamedTuple):
    """What a leaf is written for.

    Attributes:
      p: the parameter.
      leaf: its arrays as the new optimizer's ``init`` makes them.
      kept: the axes of the parameter that each of them has.
      count: the new state's.
      s: the instability where there was none.
    """

    p: jax.Array
    leaf: Leaf
    kept: Leaf
    count: Any
    s: Any


def read(p: jax.Array, leaf: Leaf, kept: Leaf) -> Moments:
    """Reads a leaf of this library's states."""
    m = None
    if "mu" in leaf:
        like = p.astype(wide_dtype(p.dtype))
        axes = _axes_of_codes(p, kept["mu"])
        m = momentum.Storage(like, axes, jnp.int32(0)).load(leaf["mu"])
    return Moments(m, *(_whole(name, p, leaf, kept) for name in ("v", "s")))


def write(moments: Moments, to: Target) -> Leaf:
    """Writes a leaf of this library's states."""
    leaf = dict(to.leaf)
    for name, whole in ("v", moments.v), ("s", moments.s):
        for field in (f"{name}_row", f"{name}_col"):
            if not to.kept.get(field):
                continue  # The leaf isn't factored, or the state has no such field.
            elif whole is None:
                leaf[field] = jnp.full_like(leaf[field], to.s)
            else:
                leaf[field] = jnp.mean(whole, lost_axes(to.p.ndim, to.kept[field]))
    if "v" in leaf and not to.kept["v_row"]:
        leaf["v"] = moments.v
    if "mu" in leaf:
        leaf["mu"] = _stored(moments.m, to)
    return leaf


def _stored(m: jax.Array, to: Target) -> momentum.Stored:
    """Returns momentum as the new optimizer stores it."""
    axes = _axes_of_codes(to.p, to.kept["mu"])
    stored, _ = momentum.Storage(m, axes, to.count).store(lambda: m, to.leaf["mu"])
    return stored


def _whole(name: str, p: jax.Array, leaf: Leaf, kept: Leaf) -> jax.Array | None:
    """Returns a statistic of each element, in a matrix as the outer product has it."""
    if not kept.get(f"{name}_row"):
        return leaf.get(name)
    over_col, over_row = (
        lost_axes(p.ndim, kept[f"{name}_{side}"]) for side in ("row", "col")
    )
    row = jnp.expand_dims(leaf[f"{name}_row"], over_col)
    col = jnp.expand_dims(leaf[f"{name}_col"], over_row)
    mean = jnp.mean(row, over_row, keepdims=True)
    whole: jax.Array = row / jnp.where(mean > 0, mean, 1) * col
    return whole


def _axes_of_codes(p: jax.Array, kept: Any) -> FactoredAxes:
    if not isinstance(kept, Codes):
        return FactoredAxes()
    over_col = lost_axes(p.ndim, kept.row_scale)
    if not kept.col_scale:  # A vector, or a stack of them.
        return FactoredAxes(stack=tuple(a for a in range(p.ndim) if a not in over_col))
    return FactoredAxes(lost_axes(p.ndim, kept.col_scale), over_col)


def _read_adam(p: jax.Array, leaf: Leaf, kept: Leaf) -> Moments:
    """CAME's momentum of Adam's: over the root mean square, itself of at most 1."""
    del kept
    v = jnp.real(leaf["nu"]).astype(real_dtype(p.dtype))
    g = leaf["mu"].astype(wide_dtype(p.dtype))
    m = g * _inverse_root(v)
    return Moments(m / jnp.maximum(1, jnp.sqrt(jnp.mean(jnp.abs(m) ** 2))), v, g=g)


def _write_adam(moments: Moments, to: Target) -> Leaf:
    return {
        "mu": _of_gradients(moments).astype(to.leaf["mu"].dtype),
        "nu": moments.v.astype(to.leaf["nu"].dtype),
    }


def _read_muon(p: jax.Array, leaf: Leaf, kept: Leaf) -> Moments:
    return Moments(g=read(p, {"mu": leaf["mu"]}, {"mu": kept["mu"]}).m)


def _write_muon(moments: Moments, to: Target) -> Leaf:
    """Of CameMuonState, too, whose rows and columns are told apart anew."""
    return to.leaf | {"mu": _stored(_of_gradients(moments), to)}


def _of_gradients(moments: Moments) -> jax.Array:
    g: jax.Array = moments.g
    return moments.m * jnp.sqrt(moments.v) if g is None else g


def _with_second_moment(moments: Moments, p: jax.Array, kept: Leaf) -> Moments:
    """CAME's moments of Muon's, over a root mean square that all of a matrix share.

    Muon knows none. That of gradients is as if they were noise, of which an average
    with β = 0.95 has a 39th of the mean square; the statistics soon have their own.
    """
    g = moments.g
    matrix = [
        axis
        for name in ("v_row", "v_col")
        if kept.get(name)
        for axis in lost_axes(p.ndim, kept[name])
    ]
    square = jnp.mean(
        jnp.abs(g) ** 2, tuple(matrix) or (-2, -1)[-g.ndim :], keepdims=True
    )
    v = 39 * jnp.broadcast_to(square, g.shape)
    return Moments(g * _inverse_root(v), v, g=g)


def _inverse_root(v: jax.Array) -> jax.Array:
    """Returns 1 / sqrt(v), or 0 where v is."""
    return jnp.where(v > 0, jax.lax.rsqrt(jnp.where(v > 0, v, 1)), 0)


def _read_ema(p: jax.Array, leaf: Leaf, kept: Leaf) -> Moments:
    return read(p, {"mu": leaf["ema"]}, {"mu": kept["ema"]})


def _write_ema(moments: Moments, to: Target) -> Leaf:
    return {"ema": moments.m.astype(to.leaf["ema"].dtype)}


class Kind(NamedTuple):
    """A kind of state that can be converted.

    Attributes:
      family: states of one family can become each other.
      algorithm: states of one algorithm go on counting in each other. In another, the
        averages are taken for what they are, without a start at zero to correct.
      read: returns the moments of a leaf whose arrays have some axes of its parameter.
      write: returns the leaf that has these moments.
    """

    family: str
    algorithm: str
    read: Callable[[jax.Array, Leaf, Leaf], Moments] = read
    write: Callable[[Moments, Target], Leaf] = write


KINDS: dict[type, Kind] = {
    ScaleByCameState: Kind("adaptive momentum", "CAME"),
    optax.ScaleByAdamState: Kind("adaptive momentum", "Adam", _read_adam, _write_adam),
    CameMuonState: Kind("adaptive momentum", "Muon", _read_muon, _write_muon),
    optax.contrib.MuonState: Kind("adaptive momentum", "Muon", _read_muon, _write_muon),
    ScaleByFactoredMomentState: Kind("factored moment", "CAME"),
    ScaleByConfidenceState: Kind("confidence", "CAME"),
    QuantizedEmaState: Kind("average", "average"),
    optax.EmaState: Kind("average", "average", _read_ema, _write_ema),
}


def convert(
    part: Part, sources: Mapping[Viewer, Part], params: Mapping[KeyPath, jax.Array]
) -> Iterator[tuple[KeyPath, Any]]:
    """Yields the arrays of a part that goes on where others are, by their paths in it.

    Those of parameters that have no source are left out.

    Args:
      part: as the new optimizer's ``init`` makes it.
      sources: the old parts that it takes the place of, by parameter.
      params: the parameters by their paths.
    """
    kind = KINDS[part.kind]
    olds = list(dict.fromkeys(sources.values()))
    alike = [x for x in olds if KINDS[x.kind].algorithm == kind.algorithm]
    count = alike[0].node.count if alike else jnp.array(_LONG_AGO, jnp.int32)
    yield (GetAttrKey("count"),), count
    for place in part.arrays:  # What else no parameter owns: Muon's coefficients.
        if owner(place, params)[0] is None and place != (GetAttrKey("count"),):
            same_kind = (x for x in olds if x.kind is part.kind)
            yield place, next(same_kind, part).arrays[place]
    s = _mean_instability(olds)
    for path, (like, kept) in part.leaves.items():
        if path not in sources:
            continue
        source = sources[path]
        old, old_kept = source.leaves[path]
        leaf = {}
        if source.kind is part.kind:  # To the last bit, if it is stored likewise.
            leaf = {
                name: jax.tree.map(lambda x, y: cast(x, y.dtype), x, like[name])
                for name, x in old.items()
                if old_kept[name] == kept[name] and _alike(x, like[name])
            }
        if len(leaf) < len(like):
            p = params[path]
            moments = KINDS[source.kind].read(p, old, old_kept)
            if moments.m is None and moments.g is not None:
                moments = _with_second_moment(moments, p, kept | old_kept)
            leaf = kind.write(moments, Target(p, like, kept, count, s)) | leaf
        for name, stored in leaf.items():
            for keys, x in jax.tree.leaves_with_path(stored):
                yield (GetAttrKey(name), *path, *keys), x


def _alike(x: Any, y: Any) -> bool:
    """Returns whether two arrays differ in dtype at most, and codes not at all."""
    coded = momentum.is_codes(x), momentum.is_codes(y)
    if any(coded):
        return all(coded) and jax.tree.map(_type, x) == jax.tree.map(_type, y)
    return bool(x.shape == y.shape)


def _type(x: jax.Array) -> tuple[Shape, Any]:
    return x.shape, x.dtype


def _mean_instability(olds: Iterable[Part]) -> jax.Array:
    """Returns the mean over the leaves that have one, 1 if none has.

    For leaves that have none as yet: as far from its start at zero as theirs.
    """
    means = [
        jnp.mean(leaf["s_row"])
        for part in olds
        for leaf, kept in part.leaves.values()
        if kept.get("s_row")
    ]
    return jnp.mean(jnp.array(means)) if means else jnp.ones([])

"""Newton and Schulz's iteration of many matrices, on one device or on a mesh.

Matrices have the shape (batch, short, long). On a mesh those of one size are stacked,
the stack is laid over all devices, so that each of them has whole matrices and iterates
on its own, and goes back to where the matrices were: two exchanges a stack, in place of
one or more for each product.
"""

import collections
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from came_optax._arrays import wide_dtype
from came_optax._factored_axes import FactoredAxes

Coefficients: TypeAlias = Sequence[tuple[float, float, float]]
Names: TypeAlias = tuple[str, ...]  # Of mesh axes.


def newton_schulz(x: jax.Array, coeffs: Coefficients, dtype: DTypeLike) -> jax.Array:
    """Returns near polar factors of matrices: (..., short, long).

    Args:
      x: the matrices.
      coeffs: the iteration's, one triple a step.
      dtype: the iteration's, and the result's.
    """
    wide = wide_dtype(x.dtype)
    x = x.astype(wide)
    # Twice, as squares of 1e-30 and 1e30 are beyond float32, and first by roots, as the
    # reciprocal of 1e38 is.
    largest = jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True)
    root = jax.lax.rsqrt(jnp.where(largest < jnp.finfo(wide).tiny, 1, largest))
    x = x * root.astype(wide) * root.astype(wide)
    square = jnp.sum(jnp.real(x * jnp.conj(x)), axis=(-2, -1), keepdims=True)
    norm = jnp.sqrt(jnp.maximum(square, 1))  # 1 or more, or of zeros.
    x = (x / norm.astype(wide)).astype(dtype)
    # On their Gram matrix two steps of wide matrices take fewer multiplications, and
    # round no more. Three would amplify what rounding adds to small eigenvalues.
    short, long = x.shape[-2:]
    at_once = 2 if 2 * long > 3 * short else 1
    for begin in range(0, len(coeffs), at_once):
        x = _polynomial(x @ jnp.conj(x.mT), coeffs[begin : begin + at_once]) @ x
    return x


def _polynomial(gram: jax.Array, coeffs: Coefficients) -> jax.Array:
    """Returns the matrix that X is multiplied by in some steps, from X Xᴴ."""
    (a, b, c), *others = coeffs
    identity = jnp.broadcast_to(jnp.eye(gram.shape[-1], dtype=gram.dtype), gram.shape)
    step = a * identity + b * gram + c * (gram @ gram)
    return _polynomial(step @ gram @ step, others) @ step if others else step


class Layout(NamedTuple):
    """How a leaf is brought to matrices.

    Attributes:
      order: its axes, those of the batch first, then those of the shorter side.
      sizes: of (batch, short, long).
      names: the mesh axes over which each of the three is sharded.
    """

    order: tuple[int, ...]
    sizes: tuple[int, int, int]
    names: tuple[Names, Names, Names]


def layout(
    shape: tuple[int, ...], axes: FactoredAxes, spec: Sequence[Any] = ()
) -> Layout:
    """Returns the layout of a leaf's matrices, each with the shorter side first.

    A square one has that side first whose mesh axes come first in the alphabet: then
    ``(d, d)`` shares a stack with its like, whichever way it is sharded. Rows and
    columns may come in any order; an axis that is sharded comes first.
    """
    entries = [*spec, *[None] * (len(shape) - len(spec))]
    names = [_names(entry) for entry in entries]

    def side(axes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sorted(axes, key=lambda axis: not names[axis]))

    def size(axes: tuple[int, ...]) -> int:
        return math.prod(shape[axis] for axis in axes)

    def names_of(axes: tuple[int, ...]) -> Names:
        return names[axes[0]] if axes else ()

    sides = side(axes.row), side(axes.col)
    short, long = sorted(sides, key=lambda s: (size(s), not names_of(s), names_of(s)))
    batch = side(tuple(a for a in range(len(shape)) if a not in short + long))
    return Layout(
        batch + short + long,
        (size(batch), size(short), size(long)),
        (names_of(batch), names_of(short), names_of(long)),
    )


def matrices(x: jax.Array, place: Layout) -> jax.Array:
    """Returns a leaf's matrices."""
    return x.transpose(place.order).reshape(place.sizes)


def leaf(x: jax.Array, shape: tuple[int, ...], place: Layout) -> jax.Array:
    """Returns the leaf of such a shape that has these matrices."""
    inverse = np.argsort(place.order)
    return x.reshape([shape[a] for a in place.order]).transpose(inverse)


def polar_factors(
    leaves: Sequence[jax.Array],
    axes: Sequence[FactoredAxes],
    dtypes: Sequence[DTypeLike],
    coeffs: Coefficients,
) -> list[jax.Array]:
    """Returns near polar factors of leaves' matrices, one leaf after the other.

    Args:
      leaves: the leaves.
      axes: their rows and columns.
      dtypes: of the iteration of each.
      coeffs: the iteration's, one triple a step.

    Returns:
      What has the shapes of the leaves, in float32 or wider.
    """
    polar = []
    for x, leaf_axes, dtype in zip(leaves, axes, dtypes, strict=True):
        place = layout(x.shape, leaf_axes)
        y = newton_schulz(matrices(x, place), coeffs, dtype)
        polar.append(leaf(y, x.shape, place).astype(wide_dtype(x.dtype)))
    return polar


def polar_factors_on_mesh(
    leaves: Sequence[jax.Array],
    axes: Sequence[FactoredAxes],
    dtypes: Sequence[DTypeLike],
    coeffs: Coefficients,
    mesh: Any,
    specs: Sequence[Sequence[Any]],
) -> list[jax.Array]:
    """Returns what :func:`polar_factors` does, each matrix iterated on one device.

    Args:
      leaves: the leaves.
      axes: their rows and columns.
      dtypes: of the iteration of each.
      coeffs: the iteration's, one triple a step.
      mesh: a mesh, whose axes are ``Auto`` or ``Manual``.
      specs: how each leaf is sharded over the ``Auto`` ones.
    """
    places = list(map(layout, (x.shape for x in leaves), axes, specs))
    groups: Any = collections.defaultdict(list)
    for i, (place, dtype) in enumerate(zip(places, dtypes, strict=True)):
        groups[place.sizes[1:], place.names, jnp.dtype(dtype)].append(i)
    stacks = []
    for (size, names, dtype), members in groups.items():
        # Matrices that are sharded as a batch stay on their devices' part of the mesh.
        shape = _number(mesh, names[0]), -1, *size
        parts = [
            matrices(leaves[i], places[i]).astype(dtype).reshape(shape) for i in members
        ]
        steps = _exchange(mesh, names)
        slots = _number(mesh, steps[-1][2])
        stacks.append(_Stack(members, jnp.concatenate(parts, axis=1), steps, slots))
    _share_rounds(stacks)
    for stack in stacks:
        x = stack.in_rounds()
        for spec in stack.steps:
            x = _constrain(x, mesh, spec)
        stack.x = x
    for guest in stacks:
        if guest.host is not None:
            guest.host.x = guest.host.x.at[guest.as_guest].add(guest.x[:, -1])
            guest.x = guest.x[:, :-1]
    for stack in stacks:
        if stack.x.size > 0:
            stack.x = newton_schulz(stack.x, coeffs, stack.x.dtype)
    polar = list(leaves)
    for stack in stacks:
        x = stack.x
        if stack.host is not None:
            x = jnp.concatenate([x, stack.host.x[stack.as_guest][:, None]], axis=1)
        for spec in reversed(stack.steps):
            x = _constrain(x, mesh, spec)
        x = stack.out_of_rounds(x)
        begin = 0
        for i in stack.members:
            end = begin + places[i].sizes[0] // x.shape[0]
            y = leaf(x[:, begin:end], leaves[i].shape, places[i])
            polar[i] = y.astype(wide_dtype(leaves[i].dtype))
            begin = end
    return polar


class _Stack:
    """Matrices of one size and dtype, sharded alike.

    They are iterated in rounds, in each of which every device has one matrix. The last
    may have fewer, and then zeros; or its matrices take the places that another stack
    of larger matrices, the host, has left.

    Attributes:
      members: the numbers of the leaves.
      x: (parts, number of matrices, short, long), and when exchanged (parts, rounds,
        slots, short, long).
      steps: the specs from the leaves' to that.
      slots: matrices in a round, of each part.
      full: matrices in full rounds.
      over: matrices in the last round, if it is not full.
      begin: where these are in it.
      free: places after them.
      host: whose last round they are part of.
    """

    def __init__(
        self, members: list[int], x: jax.Array, steps: list[PartitionSpec], slots: int
    ) -> None:
        self.members, self.x, self.steps, self.slots = members, x, steps, slots
        self.over = x.shape[1] % slots
        self.full, self.begin = x.shape[1] - self.over, 0
        self.free = -x.shape[1] % slots
        self.host: _Stack | None = None
        self.size = x.shape[2:]
        short, long = self.size
        self.as_guest = np.s_[:, -1, :, :short, :long]

    def fits(self, host: "_Stack") -> bool:
        """Returns whether the last round's matrices have a place in the host's."""
        alike = [(s.x.dtype, s.slots, s.steps[-1]) for s in (self, host)]
        smaller = all(n <= m for n, m in zip(self.size, host.size, strict=True))
        return alike[0] == alike[1] and smaller and 0 < self.over <= host.free

    def in_rounds(self) -> jax.Array:
        """Returns (parts, rounds, slots, short, long)."""
        pads = [(0, 0), (self.begin, self.slots - self.begin - self.over)]
        last = jnp.pad(self.x[:, self.full :], [*pads, (0, 0), (0, 0)])
        x = (
            jnp.concatenate([self.x[:, : self.full], last], axis=1)
            if self.over
            else self.x
        )
        return x.reshape(x.shape[0], -1, self.slots, *self.size)

    def out_of_rounds(self, x: jax.Array) -> jax.Array:
        """Returns (parts, number of matrices, short, long)."""
        x = x.reshape(x.shape[0], -1, *self.size)
        last = x[:, self.full + self.begin :][:, : self.over]
        return jnp.concatenate([x[:, : self.full], last], axis=1)


def _share_rounds(stacks: list[_Stack]) -> None:
    """Gives last rounds to larger matrices' last rounds, where there is place."""
    largest_first = sorted(stacks, key=lambda stack: math.prod(stack.size))[::-1]
    for i, guest in enumerate(largest_first):
        for host in filter(guest.fits, largest_first[:i]):
            guest.host, guest.begin = host, host.slots - host.free
            host.free -= guest.over
            guest.free = 0
            break


def _exchange(mesh: Any, names: tuple[Names, Names, Names]) -> list[PartitionSpec]:
    """Returns the ways to lay out a stack, from its leaves' to whole matrices.

    Its axes are (parts, rounds, slots, short, long). One side goes after the other, as
    XLA may replicate what it can't bring there in one go.
    """
    batch, short, long = names
    rest = tuple(
        name
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind != AxisType.Manual and name not in batch + short + long
    )
    return [
        PartitionSpec(batch, None, (), short, long),
        PartitionSpec(batch, None, short, (), long),
        PartitionSpec(batch, None, short + long),
        PartitionSpec(batch, None, short + long + rest),
    ]


def _number(mesh: Any, names: Any) -> int:
    return math.prod(mesh.shape[name] for name in _names(names))


def _constrain(x: jax.Array, mesh: Any, spec: PartitionSpec) -> jax.Array:
    x = jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))
    # Or XLA makes one constraint of several, and gathers where one exchange can't do.
    constrained: jax.Array = jax.lax.optimization_barrier(x)
    return constrained


def _names(entry: Any) -> Names:
    return entry if isinstance(entry, tuple) else () if entry is None else (entry,)

"""Newton and Schulz's iteration on a mesh, each matrix on one device.

Matrices of one size are stacked, the stack is laid over all devices, so that each of
them has whole matrices and iterates on its own, and goes back to where the matrices
were: two exchanges a stack, in place of one or more for each product.
"""

import collections
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from came_optax._arrays import wide_dtype
from came_optax._factored_axes import FactoredAxes
from came_optax._newton_schulz import (
    Coefficients,
    layout,
    leaf,
    matrices,
    newton_schulz,
)
from came_optax._specs import Names, devices


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
        shape = devices(mesh, names[0]), -1, *size
        # In float16 what isn't normalised yet could be infinite or 0.
        sent = jnp.float32 if dtype == jnp.float16 else dtype
        parts = [
            matrices(leaves[i], places[i]).astype(sent).reshape(shape) for i in members
        ]
        steps = _exchange(mesh, names)
        slots = devices(mesh, steps[-1][2])
        x = jnp.concatenate(parts, axis=1)
        stacks.append(_Stack(members, x, dtype, steps, slots))
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
            stack.x = newton_schulz(stack.x, coeffs, stack.dtype)
        else:  # All of it is a guest.
            stack.x = stack.x.astype(stack.dtype)
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
      dtype: the iteration's.
      steps: the specs from the leaves' to that.
      slots: matrices in a round, of each part.
      full: matrices in full rounds.
      over: matrices in the last round, if it is not full.
      begin: where these are in it.
      free: places after them.
      host: whose last round they are part of.
      size: (short, long).
      as_guest: where they are in the host.
    """

    def __init__(
        self,
        members: list[int],
        x: jax.Array,
        dtype: DTypeLike,
        steps: list[PartitionSpec],
        slots: int,
    ) -> None:
        self.members, self.x, self.dtype = members, x, dtype
        self.steps, self.slots = steps, slots
        self.over = x.shape[1] % slots
        self.full, self.begin = x.shape[1] - self.over, 0
        self.free = -x.shape[1] % slots
        self.host: _Stack | None = None
        self.size = x.shape[2:]
        short, long = self.size
        self.as_guest = np.s_[:, -1, :, :short, :long]

    def fits(self, host: "_Stack") -> bool:
        """Returns whether the last round's matrices have a place in the host's."""
        alike = [(s.dtype, s.slots, s.steps[-1]) for s in (self, host)]
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


def _constrain(x: jax.Array, mesh: Any, spec: PartitionSpec) -> jax.Array:
    x = jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))
    # Or XLA makes one constraint of several, and gathers where one exchange can't do.
    constrained: jax.Array = jax.lax.optimization_barrier(x)
    return constrained

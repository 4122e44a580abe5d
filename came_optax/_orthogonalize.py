"""Muon's orthogonalisation, of the matrix that a factoring rule reads in each leaf."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike, DTypeLike

from came_optax._arrays import wide_dtype
from came_optax._boxes import box_like, unbox
from came_optax._checks import as_dtype, call_hint, check_inexact, check_threshold
from came_optax._factored_axes import (
    FactoredAxes,
    FactoringRule,
    check_rule,
    checked_axes,
)
from came_optax._factoring import BalancedSplit
from came_optax._newton_schulz import Coefficients, polar_factors
from came_optax._newton_schulz_on_mesh import polar_factors_on_mesh
from came_optax._paths import KeyPath, path_name
from came_optax._placement import by_path, check_shardings, on_auto_axes, placement
from came_optax._unmatched import warn_of_unmatched
from came_optax._warning import warn

# Of x ↦ ax + bx³ + cx⁵, one triple for each step.
_PRESETS: dict[str, Coefficients] = {
    "standard": ((3.4445, -4.7750, 2.0315),) * 5,
    # The paper's, of singular values from 1e-3, each made for values 1 % too large.
    "polar_express": tuple(
        (a / 1.01, b / 1.01**3, c / 1.01**5)
        for a, b, c in (
            (8.28721201814563, -23.595886519098837, 17.300387312530933),
            (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
            (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
            (3.3184196573706015, -2.488488024314874, 0.51004894012372),
            (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
        )
    ),
}


def orthogonalize(
    *,
    factoring: FactoringRule = BalancedSplit(),
    ns_coeffs: str | Sequence[float] | Sequence[Sequence[float]] = "standard",
    consistent_rms: ArrayLike | None = 0.2,
    dtype: DTypeLike | None = None,
    params_sharding: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Brings all singular values of each leaf's matrix near 1, as Muon does.

    The matrix :math:`X = U S V^\top`, divided by its Frobenius norm, goes towards its
    polar factor :math:`U V^\top` by some steps of Newton and Schulz's iteration,

    .. math::

        X \leftarrow a X + (b X X^\top + c (X X^\top)^2) X,

    For matrices that are not near square, two steps are computed at once, on the Gram
    matrix.

    Which axes are its rows and its columns, the factoring rule says; all others, those
    of a stack too, index a batch of matrices, each of which is orthogonalised alone.
    So attention kernels ``(d, heads, head_dim)``, stacked layers, experts and
    convolutions need no more than the rule that CAME's statistics have.

    Nothing is added to the norm: a matrix of any magnitude that is a normal float32
    comes out the same, one of zeros or of subnormal numbers as zeros, and one with a
    NaN or an infinity as NaN. Inside ``jax.shard_map`` each shard is a matrix of its
    own.

    Args:
      factoring: which axes of each leaf are rows (inputs) and columns (outputs). A leaf
        that it leaves unfactored is no matrix, which is an error; leave it out with
        ``optax.masked`` or ``optax.partition``.
      ns_coeffs: :math:`(a, b, c)` of each step, or the name of a preset of five steps:
        ``"standard"``, Jordan's, which brings singular values of 0.006 and more (times
        the norm) to between 0.68 and 1.21, or ``"polar_express"``, which brings those
        of 0.001 and more to between 0.84 and 1.13. One triple alone is that of five
        steps; three of Jordan's are ``((3.4445, -4.7750, 2.0315),) * 3``.
      consistent_rms: root mean square of the update of a matrix of full rank:
        :math:`U V^\top` is multiplied by it and :math:`\sqrt{\max(rows, columns)}`.
        With 0.2 updates are as large as AdamW's. None is Jordan's
        :math:`\sqrt{\max(1, columns / rows)}`.
      dtype: of the iteration. None means bfloat16 on GPUs and TPUs and float32 on CPUs,
        where products in bfloat16 are slow; what is wider stays that wide: float64
        leaves are float64, complex ones complex.
      params_sharding: how the parameters are sharded over a mesh of ``Auto`` axes, as
        in :func:`state_sharding`. With it each matrix is iterated on one device, and
        all devices share the matrices; they are exchanged twice, in ``dtype``. Without
        it, each device does all the work, or exchanges something in each product. On
        ``Explicit`` axes the types of the updates tell, and this isn't needed.

    Returns:
      A transformation without state, whose updates have the dtype that it is given.

    Raises:
      ValueError: an argument is out of range, a leaf is no matrix, or
        ``params_sharding`` does not fit the parameters.
      TypeError: integer leaves, or a sharding of another kind.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from came_optax import orthogonalize, quantized_ema
      >>> muon = optax.chain(
      ...     quantized_ema(0.95, nesterov=True),
      ...     orthogonalize(),
      ...     optax.scale_by_learning_rate(1e-2),
      ... )
      >>> params = {"kernel": jnp.eye(64)}
      >>> updates, state = muon.update(params, muon.init(params), params)

    References:
      Jordan et al., `Muon <https://kellerjordan.github.io/posts/muon/>`_, 2024; Liu et
      al., `Muon is scalable for LLM training <https://arxiv.org/abs/2502.16982>`_,
      2025; Amsel et al., `The Polar Express <https://arxiv.org/abs/2505.16932>`_, 2025.
    """
    check_rule(factoring)
    coeffs = _checked_coeffs(ns_coeffs)
    check_threshold("consistent_rms", consistent_rms)
    _check_dtype(dtype)

    shardings = by_path(params_sharding)

    def init_fn(params: optax.Params) -> optax.EmptyState:
        jax.tree.map_with_path(matrix_axes, unbox(params))
        warn_of_unmatched(factoring, unbox(params))
        if params_sharding is not None:
            check_shardings(shardings, unbox(params))
        elif any(map(on_auto_axes, jax.tree.leaves(params))):
            warn(
                "the parameters are on a mesh of Auto axes, and params_sharding isn't "
                "given: each device orthogonalizes all matrices, or exchanges "
                "something in each product"
            )
        return optax.EmptyState()

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **_: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        del params
        check_inexact("updates", unbox(updates))
        paths, leaves = [], []
        for path, x in jax.tree.leaves_with_path(unbox(updates)):
            paths.append(path)
            leaves.append(jnp.asarray(x))
        if not leaves:
            return updates, state
        axes = list(map(matrix_axes, paths, leaves))
        polar = polar_factors_of(leaves, axes, *placement(paths, leaves, shardings))
        new = [
            (y * jnp.asarray(scale(y.shape, leaf_axes), y.dtype)).astype(x.dtype)
            for x, y, leaf_axes in zip(leaves, polar, axes, strict=True)
        ]
        return box_like(updates, new), state

    def polar_factors_of(
        leaves: list[jax.Array], axes: list[FactoredAxes], mesh: Any, specs: list[Any]
    ) -> list[jax.Array]:
        def in_dtype(default: Any, *leaves: jax.Array) -> list[jax.Array]:
            dtypes = [_iteration_dtype(x, dtype, default) for x in leaves]
            if mesh is None:
                return polar_factors(leaves, axes, dtypes, coeffs)
            # Within auto_axes there is no axis that is Explicit any more.
            auto_mesh = jax.sharding.get_abstract_mesh() if explicit else mesh
            return polar_factors_on_mesh(leaves, axes, dtypes, coeffs, auto_mesh, specs)

        def by_platform(*leaves: jax.Array) -> list[jax.Array]:
            if dtype is not None:
                return in_dtype(dtype, *leaves)
            polar: list[jax.Array] = jax.lax.platform_dependent(
                *leaves,
                cpu=functools.partial(in_dtype, jnp.float32),
                default=functools.partial(in_dtype, jnp.bfloat16),
            )
            return polar

        explicit = () if mesh is None else mesh.explicit_axes
        if not explicit:
            return by_platform(*leaves)
        types: list[Any] = [jax.typeof(x).sharding for x in leaves]
        on_auto_axes: Any = jax.sharding.auto_axes(
            by_platform, axes=explicit, out_sharding=types
        )
        polar: list[jax.Array] = on_auto_axes(*leaves)
        return polar

    def matrix_axes(path: KeyPath, x: Any) -> FactoredAxes:
        axes = checked_axes(factoring, path, x.shape)
        if x.size and not axes.factored:
            raise ValueError(
                f"leaf {path_name(path)!r} of shape {x.shape} is no matrix to "
                f"{factoring!r}; orthogonalize takes matrices only (optax.masked and "
                "optax.partition leave others out)"
            )
        return axes

    def scale(shape: tuple[int, ...], axes: FactoredAxes) -> ArrayLike:
        rows, cols = (
            math.prod(shape[a] for a in some) for some in (axes.row, axes.col)
        )
        if consistent_rms is None:
            return math.sqrt(max(1, cols / rows))
        return consistent_rms * math.sqrt(max(rows, cols))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _check_dtype(dtype: Any) -> None:
    if dtype is not None:
        given = as_dtype(dtype)
        if given is None or not jnp.issubdtype(given, jnp.floating):
            raise ValueError(
                "dtype must be a real floating dtype or None (came_muon calls it "
                f"ns_dtype), got {dtype!r}{call_hint(dtype)}"
            )


def _iteration_dtype(x: jax.Array, given: DTypeLike | None, default: DTypeLike) -> Any:
    """Returns the dtype that a leaf's matrices are iterated in."""
    wide = wide_dtype(x.dtype)
    if jnp.issubdtype(wide, jnp.complexfloating):
        return wide
    if given is not None:
        return given
    return default if wide == jnp.float32 else wide


def _checked_coeffs(ns_coeffs: Any) -> Coefficients:
    """Returns the iteration's coefficients, one triple a step."""
    if isinstance(ns_coeffs, str) and ns_coeffs in _PRESETS:
        return _PRESETS[ns_coeffs]
    given: Any = np.zeros(0)
    with contextlib.suppress(TypeError, ValueError):  # Ragged, or traced.
        given = np.asarray(ns_coeffs)
    if given.shape == (3,):
        given = np.tile(given, (5, 1))
    numbers = given.dtype.kind in "fi" and np.isfinite(given).all()
    if not numbers or given.ndim != 2 or given.shape[1] != 3 or not given.size:
        hint = " (optax.inject_hyperparams traces arrays: give tuples)"
        raise ValueError(
            f"ns_coeffs must be {' or '.join(map(repr, _PRESETS))}, a triple of "
            "finite numbers, or a sequence of triples, one for each step, got "
            f"{ns_coeffs!r}{hint if isinstance(ns_coeffs, jax.Array) else ''}"
        )
    return tuple((float(a), float(b), float(c)) for a, b, c in given)

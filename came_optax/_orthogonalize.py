"""Muon's orthogonalisation, of the matrix that a factoring rule reads in each leaf."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike, DTypeLike

from came_optax._arrays import wide_dtype
from came_optax._boxes import box_like, unbox
from came_optax._checks import (
    KeyPath,
    check_inexact,
    check_threshold,
    path_name,
)
from came_optax._factoring import (
    BalancedSplit,
    FactoredAxes,
    FactoringRule,
    check_rule,
    checked_axes,
)

Coefficients: TypeAlias = tuple[tuple[float, float, float], ...]

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
    ns_coeffs: str | Sequence[Sequence[float]] = "standard",
    consistent_rms: ArrayLike | None = 0.2,
    dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Brings all singular values of each leaf's matrix near 1, as Muon does.

    The matrix :math:`X = U S V^\top`, divided by its Frobenius norm, goes towards its
    polar factor :math:`U V^\top` by some steps of Newton and Schulz's iteration,

    .. math::

        X \leftarrow a X + (b X X^\top + c (X X^\top)^2) X.

    Which axes are its rows and its columns, the factoring rule says; all others, those
    of a stack too, index a batch of matrices, each of which is orthogonalised alone.
    So attention kernels ``(d, heads, head_dim)``, stacked layers, experts and
    convolutions need no more than the rule that CAME's statistics have.

    Nothing is added to the norm: a matrix of any magnitude that float32 can hold comes
    out the same, one of zeros as zeros, and one with a NaN or an infinity as NaN.

    Args:
      factoring: which axes of each leaf are rows (inputs) and columns (outputs). A leaf
        that it leaves unfactored is no matrix, which is an error; leave it out with
        ``optax.masked`` or ``optax.partition``.
      ns_coeffs: :math:`(a, b, c)` of each step, or the name of a preset of five steps:
        ``"standard"``, Jordan's, which brings singular values of 0.006 and more (times
        the norm) to between 0.68 and 1.21, or ``"polar_express"``, which brings those
        of 0.001 and more to between 0.84 and 1.13. Three of Jordan's steps are
        ``((3.4445, -4.7750, 2.0315),) * 3``.
      consistent_rms: root mean square of the update of a matrix of full rank:
        :math:`U V^\top` is multiplied by it and :math:`\sqrt{\max(rows, columns)}`.
        With 0.2 updates are as large as AdamW's. None is Jordan's
        :math:`\sqrt{\max(1, columns / rows)}`.
      dtype: of the iteration. None means bfloat16 on GPUs and TPUs and float32 on CPUs,
        where products in bfloat16 are slow; what is wider stays that wide: float64
        leaves are float64, complex ones complex.

    Returns:
      A transformation without state, whose updates have the dtype that it is given.

    Raises:
      ValueError: an argument is out of range, or a leaf is no matrix.
      TypeError: integer leaves.

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
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype must be a real floating dtype or None, got {dtype!r}")

    def init_fn(params: optax.Params) -> optax.EmptyState:
        jax.tree.map_with_path(matrix_axes, unbox(params))
        return optax.EmptyState()

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **_: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        del params
        check_inexact("updates", updates)
        new = jax.tree.map_with_path(orthogonalize_leaf, unbox(updates))
        return box_like(updates, new), state

    def matrix_axes(path: KeyPath, x: Any) -> FactoredAxes:
        axes = checked_axes(factoring.axes(path, x.shape), path, x.shape)
        if x.size and not axes.factored:
            raise ValueError(
                f"leaf {path_name(path)!r} of shape {x.shape} is no matrix to "
                f"{factoring!r}; orthogonalize takes matrices only (optax.masked and "
                "optax.partition leave others out)"
            )
        return axes

    def orthogonalize_leaf(path: KeyPath, x: jax.Array) -> jax.Array:
        axes = matrix_axes(path, x)
        if x.size == 0:
            return x
        rows, cols = (
            math.prod(x.shape[a] for a in some) for some in (axes.row, axes.col)
        )
        if consistent_rms is None:
            scale: ArrayLike = math.sqrt(max(1, cols / rows))
        else:
            scale = consistent_rms * math.sqrt(max(rows, cols))
        matrices = as_matrices(x, axes)
        if dtype is None and wide_dtype(x.dtype) == jnp.float32:
            polar = jax.lax.platform_dependent(
                matrices,
                cpu=lambda x: newton_schulz(x, coeffs, jnp.float32),
                default=lambda x: newton_schulz(x, coeffs, jnp.bfloat16),
            )
        else:
            polar = newton_schulz(matrices, coeffs, dtype)
        scaled = polar * jnp.asarray(scale, polar.dtype)
        return from_matrices(scaled, x.shape, axes).astype(x.dtype)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def newton_schulz(
    x: jax.Array, coeffs: Coefficients, dtype: DTypeLike | None = None
) -> jax.Array:
    """Returns near polar factors of matrices: (batch, rows, columns), rows ≤ columns.

    Args:
      x: the matrices.
      coeffs: the iteration's, one triple a step.
      dtype: the iteration's; None for the matrices' own, float32 at least. Complex ones
        keep theirs.

    Returns:
      What has the shape of ``x``, float32 or wider.
    """
    wide = wide_dtype(x.dtype)
    if dtype is None or jnp.iscomplexobj(x):
        dtype = wide
    x = x.astype(wide)
    # Twice, as squares of 1e-30 and 1e30 are beyond float32, and first by roots, as the
    # reciprocal of 1e38 is.
    largest = jnp.max(jnp.abs(x), axis=(1, 2), keepdims=True)
    root = jax.lax.rsqrt(jnp.where(largest < jnp.finfo(wide).tiny, 1, largest))
    x = x * root.astype(wide) * root.astype(wide)
    square = jnp.sum(jnp.real(x * jnp.conj(x)), axis=(1, 2), keepdims=True)
    norm = jnp.sqrt(jnp.maximum(square, 1))  # 1 or more, or of zeros.
    x = (x / norm.astype(wide)).astype(dtype)
    for a, b, c in coeffs:
        gram = x @ jnp.conj(x.mT)
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.astype(wide)


def as_matrices(x: jax.Array, axes: FactoredAxes) -> jax.Array:
    """Returns a leaf's matrices: (batch, rows, columns), or columns first if fewer."""
    order, sizes = _order(x.shape, axes)
    return x.transpose(order).reshape(sizes)


def from_matrices(
    matrices: jax.Array, shape: tuple[int, ...], axes: FactoredAxes
) -> jax.Array:
    """Returns the leaf of such a shape that has these matrices."""
    order, _ = _order(shape, axes)
    return matrices.reshape([shape[a] for a in order]).transpose(np.argsort(order))


def _order(
    shape: tuple[int, ...], axes: FactoredAxes
) -> tuple[tuple[int, ...], tuple[int, int, int]]:
    """Returns the axes in the order of (batch, short, long), and these sizes."""

    def size(axes: tuple[int, ...]) -> int:
        return math.prod(shape[a] for a in axes)

    short, long = sorted((axes.row, axes.col), key=size)
    batch = tuple(a for a in range(len(shape)) if a not in short + long)
    return batch + short + long, (size(batch), size(short), size(long))


def _checked_coeffs(ns_coeffs: Any) -> Coefficients:
    """Returns the iteration's coefficients, one triple a step."""
    if isinstance(ns_coeffs, str) and ns_coeffs in _PRESETS:
        return _PRESETS[ns_coeffs]
    given = np.asarray(ns_coeffs)
    if given.dtype.kind not in "fi" or given.ndim != 2 or given.shape[1] != 3:
        raise ValueError(
            f"ns_coeffs must be {' or '.join(map(repr, _PRESETS))}, or a sequence of "
            f"triples of numbers, one for each step, got {ns_coeffs!r}"
        )
    return tuple((float(a), float(b), float(c)) for a, b, c in given)

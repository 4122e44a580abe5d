"""Muon with a factored second moment for hidden matrices, CAME for all else."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax
from jax.typing import ArrayLike, DTypeLike

from came_optax._boxes import unbox
from came_optax._came import steady_came
from came_optax._checks import (
    check_learning_rate,
    check_regex,
    check_scalar,
    check_state,
)
from came_optax._factored_axes import FactoringRule
from came_optax._factoring import BalancedSplit
from came_optax._hidden import hidden_leaves
from came_optax._momentum import MuDtype
from came_optax._muon_update import matrix_transform
from came_optax._orthogonalize import orthogonalize
from came_optax._transformation import transformation
from came_optax._unmatched import warn_of_unmatched
from came_optax._weight_decay import add_decayed_weights


def came_muon(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.95,
    b2: ArrayLike = 0.95,
    *,
    weight_decay: float | jax.Array = 0.0,
    weight_decay_mask: Any | Callable[[optax.Params], Any] | None = None,
    hidden: str | Any | Callable[[optax.Params], Any] | None = None,
    rest_learning_rate_scale: ArrayLike = 1.0,
    factoring: FactoringRule = BalancedSplit(min_dim_size=2),
    mu_dtype: MuDtype = "int8",
    nesterov: bool = True,
    ns_coeffs: str | Sequence[float] | Sequence[Sequence[float]] = "standard",
    consistent_rms: ArrayLike | None = 0.2,
    ns_dtype: DTypeLike | None = None,
    params_sharding: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Muon's kind of update on a byte of state a parameter, and CAME for the rest.

    Hidden matrices have Muon's update, whose rows and columns are then brought to about
    one size by a factored second moment, as CAME and Adafactor have it; embeddings,
    heads, positions and vectors are updated by :func:`steady_came`. At step :math:`t` a
    hidden matrix of gradient :math:`g` moves by

    .. math::

        m &\leftarrow \beta_1 m + (1 - \beta_1) g \\
        X &= \beta_1 m / (1 - \beta_1^{t+1}) + (1 - \beta_1) g / (1 - \beta_1^t) \\
        X &\leftarrow X / \lVert X \rVert_F \\
        X &\leftarrow a X + b X X^\top X + c (X X^\top)^2 X
            \quad\text{(five times)} \\
        v_r &\leftarrow \beta_2 v_r + (1 - \beta_2)
            \operatorname{mean}_{col}(X^2), \quad v_c \text{ likewise} \\
        X &\leftarrow X \, / \sqrt{v_r v_c^\top / \operatorname{mean}(v_r)} \\
        \theta &\leftarrow \theta - \eta \left(
            0.2 \, X / \operatorname{RMS}(X) + \lambda \theta \right)

    A matrix whose momentum is 0 moves by its decay alone. One of low rank moves its few
    directions further than under Muon, as all updates have one size.

    With ``mu_dtype="int8"`` hidden matrices and the rest take about 1 byte of state a
    parameter; ``optax.contrib.muon`` takes 4 for hidden matrices and 8 for the rest.
    The five steps cost up to 20 m² n + 10 m³ operations for a matrix of m rows and n ≥
    m columns. Warm up as with AdamW.

    Which leaves are hidden matrices is told by names and by the factoring rule, if
    ``hidden`` doesn't say. Before a long run, look at what was chosen, as the example
    does.

    - By name, these are left out: embeddings (``embed``, ``wte``, ``wpe``, ``vocab``),
      positions (``pos``, ``position``, ``posemb``, ``pe``), heads (``head``,
      ``lm_head``, ``logits``, ``classifier``, ``readout``, ``predictions``, ``score``),
      norms (``norm``, ``rms``, ``ln``) and what is called ``scale``, ``bias``, ``b``,
      ``gamma``, ``beta``, ``offset`` or ``token``.
    - So is all that the rule doesn't factor, and what has one row or one column: a
      vector, or with ``Stacked`` a stack of vectors.
    - Norms of several layers in one leaf that the rule doesn't know for a stack, and
      experts in one leaf that it reads as one matrix, are an error.

    Args:
      learning_rate: step size, a number or a schedule; begin with twice AdamW's.
      b1: decay rate of the hidden matrices' momentum; 0 ≤ b1 < 1.
      b2: decay rate of the second moment of the orthogonalised momentum; 0 ≤ b2 < 1.
        The rest has :func:`steady_came`'s own b1 and b2.
      weight_decay: decoupled weight decay of all leaves, multiplied by their learning
        rate; if not 0, ``update`` needs ``params``.
      weight_decay_mask: as in :func:`came`. A function is called with one group's
        leaves at a time, ``optax.MaskedNode()`` in place of the others: let it use
        ``jax.tree.map``.
      hidden: which leaves are hidden matrices: a regular expression, searched in each
        leaf's path written as ``"blocks/0/up/kernel"``, a tree of bools (or a prefix of
        one), or a function to one from parameters, or from anything of their paths and
        shapes: in ``update`` it is called with gradients. For
        ``optax.inject_hyperparams`` name it in ``static_args``. It must name at least
        one leaf, and none that the rule does not factor.
      rest_learning_rate_scale: the learning rate of all other leaves, as a multiple of
        ``learning_rate``; ≥ 0.
      factoring: which axes of each leaf are rows and columns, of its statistics and of
        the matrix that is orthogonalised. ``BalancedSplit`` reads attention kernels and
        convolutions as the matrices that they are, and ``LastTwoAxes`` as batches of
        their last two axes. ``Stacked(BalancedSplit())`` is for layers stacked by
        ``nn.scan`` and ``nnx.scan``, and for experts; :class:`ByPath` for Gemma's
        einsums; :class:`ByMuonDimensionNumbers` for who has those.
      mu_dtype: how momentum is stored, of all leaves: None or float32, bfloat16, int8
        or int4, as a dtype or its name.
      nesterov: whether the hidden matrices' update looks one step ahead.
      ns_coeffs: the iteration's coefficients; see :func:`orthogonalize`.
      consistent_rms: root mean square of a hidden matrix's update, before learning rate
        and weight decay; 0.2 is about AdamW's. None is 1/√rows, as long as Jordan's
        Muon is at full rank.
      ns_dtype: the iteration's; see ``dtype`` of :func:`orthogonalize`.
      params_sharding: the parameters' on a mesh of ``Auto`` axes, so that its devices
        share the iteration; see :func:`orthogonalize`.

    Returns:
      The optimizer. Its state is that of an ``optax.partition`` into ``"hidden"``, with
      a :class:`CameMuonState`, and ``"rest"``; its updates have the parameters' dtype.

    Raises:
      ValueError: an argument or a leaf's axes are out of range, ``hidden`` names one
        that is no matrix, or no leaf is a hidden matrix.
      TypeError: integer leaves, or a state that another transformation made.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from came_optax import came_muon, state_memory
      >>> params = {
      ...     "embed": jnp.ones((512, 64)),
      ...     "up": {"kernel": jnp.ones((64, 256)), "bias": jnp.zeros(256)},
      ... }
      >>> tx = came_muon(1e-2, weight_decay=0.1)
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> params = optax.apply_updates(params, updates)
      >>> print(state_memory(tx, params).by_leaf_table())
                  group   shape  rows  columns  parameters  state bytes  bytes/param
      embed        rest  512×64   512       64      32,768       39,684        1.211
      up/kernel  hidden  64×256    64      256      16,384       18,944        1.156
      up/bias      rest     256                        256        2,064        8.062
      (other)                                                         8
      total                                         49,408       60,700        1.229

    References:
      Jordan et al., `Muon <https://kellerjordan.github.io/posts/muon/>`_, 2024; Liu et
      al., `Muon is scalable for LLM training <https://arxiv.org/abs/2502.16982>`_,
      2025; Li et al., `NorMuon <https://arxiv.org/abs/2510.05491>`_, 2025, with one
      second moment a neuron in the place of rows and columns; Luo et al., `CAME
      <https://arxiv.org/abs/2307.02047>`_, 2023.
    """
    check_scalar(
        "rest_learning_rate_scale", rest_learning_rate_scale, at_least=0, below=math.inf
    )
    check_learning_rate(learning_rate)
    if isinstance(hidden, str):
        check_regex("hidden", hidden)

    matrices = transformation(
        matrix_transform(
            b1=b1,
            b2=b2,
            nesterov=nesterov,
            factoring=factoring,
            mu_dtype=mu_dtype,
            orthogonalize=orthogonalize(
                factoring=factoring,
                ns_coeffs=ns_coeffs,
                consistent_rms=1.0,
                dtype=ns_dtype,
                params_sharding=params_sharding,
            ),
            consistent_rms=consistent_rms,
        ),
        add_decayed_weights(weight_decay, weight_decay_mask),
        optax.scale_by_learning_rate(learning_rate),
    )
    rest = steady_came(
        _scaled(learning_rate, rest_learning_rate_scale),
        weight_decay=weight_decay,
        weight_decay_mask=weight_decay_mask,
        factoring=factoring,
        mu_dtype=mu_dtype,
    )

    def label(params: optax.Params) -> Any:
        chosen = hidden_leaves(unbox(params), hidden, factoring)
        return jax.tree.map(lambda is_hidden: "hidden" if is_hidden else "rest", chosen)

    tx = optax.partition({"hidden": matrices, "rest": rest}, label)

    def init_fn(params: optax.Params) -> optax.OptState:
        warn_of_unmatched(factoring, unbox(params))
        return tx.init(params)

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        check_state(state, optax.transforms.PartitionState, "came_muon")
        if state.inner_states.keys() != {"hidden", "rest"}:
            raise TypeError(
                "the state of came_muon must have the groups 'hidden' and 'rest', got "
                f"{sorted(state.inner_states)}; convert_state takes over Muon's"
            )
        return tx.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _scaled(learning_rate: Any, scale: Any) -> Any:
    if callable(learning_rate):
        return lambda count: scale * learning_rate(count)
    return scale * learning_rate

"""Which leaves are hidden matrices: those that Muon is for."""

from __future__ import annotations

import math
import re
from typing import Any

import jax

from came_optax._checks import checked_mask
from came_optax._factored_axes import FactoringRule, checked_axes
from came_optax._paths import KeyPath, path_name, some_names

# What Flax, Haiku, Equinox, MaxText, Levanter and Hugging Face call embeddings,
# positions, heads, and the vectors of norms and biases.
_NOT_HIDDEN = re.compile(
    r"""embed|wte|wpe|vocab
    # But not a position-wise feed-forward layer.
    |(^|[/_])(abs|rel)?pos(?!(ition(al)?)?_?(wise|ff|feed))(ition|emb|enc|[/_]|$)
    # Nor one of attention's heads.
    |^(?!.*(attn|attention|multi_?head)\w*/).*(?<!multi)(?<!multi_)head(_\d+)?(/|$)
    |logit|classifi|readout|(^|/)(predictions|score)(/|$)
    |(^|/)pe(/|$)
    |norm|(^|[/_])rms|(^|/)ln(_\w+|\d+)?(/|$)
    |(^|[/_])(scale|bias|gamma|beta|offset|token)s?(_\d+)?$
    |(^|/)b(_\w+|\d+)?$""",
    re.VERBOSE | re.IGNORECASE,
)
# Several of them in one leaf are a stack, unless they are the norms of some heads.
_NORM = re.compile(
    r"(?<![qk]_)(?<![qk])(?<!query_)(?<!key_)norm|(^|[/_])rms|(^|/)ln(_\w+|\d+)?/", re.I
)
_EXPERTS = re.compile(r"expert|(^|[/_])moe", re.IGNORECASE)


def hidden_leaves(params: Any, hidden: Any, factoring: FactoringRule) -> Any:
    """Returns a tree of bools that says which leaves are hidden matrices.

    Args:
      params: arrays or shapes, without boxes.
      hidden: as `came_muon` takes it; None chooses by name.
      factoring: what reads leaves as matrices.

    Raises:
      ValueError: `hidden` names no leaf, or one that is no matrix; a leaf seems to be a
        stack that `factoring` reads as one matrix.
    """
    if hidden is None:
        mask = jax.tree.map_with_path(
            lambda path, p: _is_hidden_by_name(path, p.shape, factoring), params
        )
    elif isinstance(hidden, str):
        mask = jax.tree.map_with_path(
            lambda path, _: bool(re.search(hidden, path_name(path))), params
        )
    else:
        mask = checked_mask("hidden", hidden, params)
    if jax.tree.leaves(params) and not any(jax.tree.leaves(mask)):
        paths = [path for path, _ in jax.tree.leaves_with_path(params)]
        if hidden is None:
            raise ValueError(
                f"none of the leaves {some_names(paths)} is a hidden matrix by its "
                "name and shape: say which are with hidden=..."
            )
        raise ValueError(
            f"hidden={hidden!r} names none of the leaves {some_names(paths)}"
        )

    def check(path: KeyPath, is_hidden: Any, p: Any) -> None:
        if is_hidden and not checked_axes(factoring, path, p.shape).factored:
            raise ValueError(
                f"hidden={hidden!r} names leaf {path_name(path)!r} of shape {p.shape}, "
                f"which is no matrix to {factoring!r}"
            )

    jax.tree.map_with_path(check, mask, params)
    return mask


def _is_hidden_by_name(
    path: KeyPath, shape: tuple[int, ...], factoring: FactoringRule
) -> bool:
    """Returns whether a leaf is a hidden matrix, if ``hidden`` doesn't say."""
    name, axes = path_name(path), checked_axes(factoring, path, shape)
    one_matrix = axes.factored and len(axes.row + axes.col) == len(shape)
    module_and_name = "/".join(name.split("/")[-2:])  # Not a linear layer in a norm.
    if _NORM.search(module_and_name) and one_matrix:
        kind = "the norms of several layers"
    elif _EXPERTS.search(name) and one_matrix and len(shape) > 2:
        kind = "several experts"
    else:
        sizes = [math.prod(shape[a] for a in some) for some in (axes.row, axes.col)]
        is_matrix = axes.factored and min(sizes) > 1
        return is_matrix and not _NOT_HIDDEN.search(name)
    raise ValueError(
        f"leaf {name!r} of shape {shape} seems to hold {kind}, but {factoring!r} reads "
        "it as one matrix, and would so read their kernels: say which axis is stacked "
        "with factoring=Stacked(BalancedSplit(), axis=..., where=...), or which leaves "
        "are hidden matrices with hidden=..."
    )

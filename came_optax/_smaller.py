"""Factoring rules under which an optimizer's state would be smaller."""

import collections
import math
import re
from collections.abc import Callable, Iterator, Mapping

from came_optax._checks import KeyPath, Shape, path_name
from came_optax._factoring import BalancedSplit, FactoringRule, Stacked, all_factored_by

_WORTH_SAYING = 0.9


def smaller_rules(
    count_bytes: Callable[[], int],
    total: int,
    least: float,
    shapes: Mapping[KeyPath, Shape],
) -> dict[FactoringRule, int]:
    """Returns rules that save more than a tenth of the state, and the bytes with each.

    Every rule is tried: the bytes are those of what ``init`` would make under it. The
    axes that may stack layers are guessed from the shapes, hence ``BalancedSplit()`` is
    last, and always there.

    Args:
      count_bytes: counts the state's bytes.
      total: what it counts under the rule in use.
      least: bytes that no rule could save; nothing is tried where that is nearly all.
      shapes: those of the parameters.
    """

    def bytes_under(rule: FactoringRule) -> int:
        with all_factored_by(rule):
            return count_bytes()

    enough = _WORTH_SAYING * total
    # No rule of ours has smaller statistics than this one.
    if least >= enough or (balanced := bytes_under(BalancedSplit())) >= enough:
        return {}
    stacked = {rule: bytes_under(rule) for rule in _stacks(shapes)}
    return {
        rule: size
        for rule, size in [*stacked.items(), (BalancedSplit(), balanced)]
        if size < enough
    }


def _stacks(shapes: Mapping[KeyPath, Shape]) -> Iterator[FactoringRule]:
    """Yields rules for subtrees whose leaves all have one axis alike, as stacks have.

    For each axis, the length that most numbers in the parameters have in common.
    """
    subtrees = collections.defaultdict(list)
    for path, shape in shapes.items():
        for depth in range(len(path)):
            subtrees[path[:depth]].append(shape)
    # Of subtrees with the same leaves the innermost, "decoder/layers" for "decoder".
    outer = {
        prefix[:-1]
        for prefix, inside in subtrees.items()
        if prefix and len(inside) == len(subtrees[prefix[:-1]])
    }
    for axis in (0, 1):
        stacks = {
            prefix: inside[0][axis]
            for prefix, inside in subtrees.items()
            if prefix not in outer and _is_stack(inside, axis)
        }
        sizes: collections.Counter[int] = collections.Counter()
        prefixes = collections.defaultdict(list)
        for prefix, length in stacks.items():
            if not any(prefix[:depth] in stacks for depth in range(len(prefix))):
                sizes[length] += sum(map(math.prod, subtrees[prefix]))
                prefixes[length].append(re.escape(path_name(prefix)))
        if sizes:
            (length, _), *_ = sizes.most_common(1)
            names = prefixes[length]
            where = f"^{names[0]}/" if len(names) == 1 else f"^({'|'.join(names)})/"
            yield Stacked(BalancedSplit(), axis, "" if names == [""] else where)


def _is_stack(shapes: list[Shape], axis: int) -> bool:
    """Whether slices of all shapes along one axis could be the leaves of a layer."""
    if not all(len(shape) > axis for shape in shapes):
        return False
    lengths = {shape[axis] for shape in shapes}
    slices = {shape[:axis] + shape[axis + 1 :] for shape in shapes}
    # Layers of one kernel each, or of vectors alone, are hardly ever seen.
    return len(lengths) == 1 < min(lengths) and len(slices) > 1 < max(map(len, slices))

"""The search for each optimizer's learning rate, by the same rule for all.

Learning rates lie on a lattice, 10^(k/4). From a first guess, four that are √10 apart
are tried; then the range is extended until both ends are clearly worse than the best;
then the best one's neighbours are tried.
"""

import itertools
import math
from collections.abc import Mapping, Sequence

# How much worse than the best still counts as good.
TOLERANCE = 0.01
# What every search begins with.
FEWEST = 4
LOWEST, HIGHEST = -24, 4


def learning_rate(index: int) -> float:
    """Returns the lattice's learning rate, to three digits."""
    return float(f"{10 ** (index / 4):.2e}")


def index_of(learning_rate: float) -> int:
    """Returns the index of the lattice's nearest learning rate."""
    return round(4 * math.log10(learning_rate))


def next_index(losses: Mapping[int, float], first: int) -> int | None:
    """Returns which learning rate to try next, None when the search is over.

    Args:
        losses: Final losses by index, infinite where training diverged.
        first: The index that the search starts from.
    """
    for index in (first, first - 2, first + 2, first - 4):
        if index not in losses:
            return index
    best = best_index(losses)
    good = losses[best] * (1 + TOLERANCE)
    low, high = min(losses), max(losses)
    if not losses[low] > good or math.isinf(losses[best]):
        if low - 2 >= LOWEST:
            return low - 2
    if not losses[high] > good and high + 2 <= HIGHEST:
        return high + 2
    for index in (best - 1, best + 1):
        if index not in losses:
            return index
    return None


def best_index(losses: Mapping[int, float]) -> int:
    """Returns the index with the lowest loss."""
    return min(losses, key=lambda index: losses[index])


def best_mean(losses: Mapping[int, Sequence[float]]) -> int:
    """Returns the index whose runs, one a seed, have the lowest mean loss."""
    return min(losses, key=lambda index: sum(losses[index]) / len(losses[index]))


def good_range(losses: Mapping[int, float]) -> tuple[float, float]:
    """Returns the learning rates between which the loss is within 1 % of the best.

    The loss is interpolated linearly in the logarithm of the learning rate. Next to a
    run that diverged, the range ends at the last that did not.
    """
    best = best_index(losses)
    limit = losses[best] * (1 + TOLERANCE)
    ordered = sorted(losses)
    position = ordered.index(best)
    low = _crossing(losses, ordered[position::-1], limit)
    high = _crossing(losses, ordered[position:], limit)
    return 10 ** (low / 4), 10 ** (high / 4)


def _crossing(losses: Mapping[int, float], path: list[int], limit: float) -> float:
    """Walks from the best index to where the loss first passes the limit."""
    for inside, outside in itertools.pairwise(path):
        if losses[outside] > limit:
            if math.isinf(losses[outside]):
                return inside
            rise = losses[outside] - losses[inside]
            return inside + (outside - inside) * (limit - losses[inside]) / rise
    return path[-1]

"""How well counting does: the losses that a language model has to beat."""

import numpy as np

PART = 10_000_000  # Tokens counted at once.


def cross_entropies(
    train: np.ndarray, validation: np.ndarray, vocab_size: int
) -> dict[str, float]:
    """Cross-entropies of the validation text in nats per token.

    Unigram probabilities are counts plus one. The bigram model interpolates with them
    by Witten and Bell's rule: p(w | v) = (c(v, w) + T(v) p(w)) / (c(v) + T(v)), where
    T(v) counts the different tokens seen after v.
    """
    count_V, pairs, pair_counts = _count(train, vocab_size)
    unigram_V = (count_V + 1.0) / (count_V + 1.0).sum()
    seen_V = count_V.copy()
    seen_V[train[-1]] -= 1  # Nothing follows the last.
    kinds_V = np.bincount(pairs // vocab_size, minlength=vocab_size)
    validation = validation.astype(np.int64)

    before, after = validation[:-1], validation[1:]
    wanted = before * vocab_size + after
    index = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
    count = np.where(pairs[index] == wanted, pair_counts[index], 0)
    # A token never followed by any leaves 0/0: the unigram model then stands alone.
    kinds = np.maximum(kinds_V[before], 1)
    bigram = (count + kinds * unigram_V[after]) / (seen_V[before] + kinds)
    return {
        "unigram": float(-np.log(unigram_V[after]).mean()),
        "bigram": float(-np.log(bigram).mean()),
    }


def _count(
    tokens: np.ndarray, vocab_size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Counts tokens, and pairs of neighbours as first * vocab_size + second.

    Part by part, as this takes many times the memory of the tokens.
    """
    count_V = np.zeros(vocab_size, np.int64)
    pairs, counts = np.zeros(0, np.int64), np.zeros(0, np.int64)
    for start in range(0, len(tokens), PART):
        part = tokens[start : start + PART + 1].astype(np.int64)
        count_V += np.bincount(part[:PART], minlength=vocab_size)
        new, new_counts = np.unique(
            part[:-1] * vocab_size + part[1:], return_counts=True
        )
        pairs, place = np.unique(np.concatenate([pairs, new]), return_inverse=True)
        summed = np.zeros(len(pairs), np.int64)
        np.add.at(summed, place, np.concatenate([counts, new_counts]))
        counts = summed
    return count_V, pairs, counts

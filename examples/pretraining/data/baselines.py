"""How well counting does: the losses that a language model has to beat."""

import numpy as np


def cross_entropies(
    train: np.ndarray, validation: np.ndarray, vocab_size: int
) -> dict[str, float]:
    """Cross-entropies of the validation text in nats per token.

    Unigram probabilities are counts plus one. The bigram model interpolates with them
    by Witten and Bell's rule: p(w | v) = (c(v, w) + T(v) p(w)) / (c(v) + T(v)), where
    T(v) counts the different tokens seen after v.
    """
    train, validation = train.astype(np.int64), validation.astype(np.int64)
    unigram_V = np.bincount(train, minlength=vocab_size) + 1.0
    unigram_V /= unigram_V.sum()

    pairs, pair_counts = np.unique(
        train[:-1] * vocab_size + train[1:], return_counts=True
    )
    seen_V = np.bincount(train[:-1], minlength=vocab_size)
    kinds_V = np.bincount(pairs // vocab_size, minlength=vocab_size)

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

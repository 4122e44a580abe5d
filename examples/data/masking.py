"""BERT's vocabulary, and its masking, drawn anew each time a record is read.

References:
    Devlin et al., BERT, 2018 (80 / 10 / 10); Liu et al., RoBERTa, 2019 (dynamic).
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import tokenizers
from tokenizers import Tokenizer

from data.tokenization import cached
from task import Record

PAD, UNKNOWN, CLS, SEP, MASK = SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
CLS_ID, SEP_ID, MASK_ID = map(SPECIAL.index, (CLS, SEP, MASK))
RATE = 0.15


def wordpiece(documents: Sequence[str], vocab_size: int) -> Tokenizer:
    """Returns BERT's kind of tokenizer: lower-case WordPiece, special tokens first."""

    def train(documents: Sequence[str]) -> Tokenizer:
        tokenizer = Tokenizer(tokenizers.models.WordPiece(unk_token=UNKNOWN))
        tokenizer.normalizer = tokenizers.normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = tokenizers.decoders.WordPiece()
        trainer = tokenizers.trainers.WordPieceTrainer(
            vocab_size=vocab_size, special_tokens=list(SPECIAL), show_progress=False
        )
        tokenizer.train_from_iterator(documents, trainer)
        tokenizer.post_processor = tokenizers.processors.BertProcessing(
            (SEP, SEP_ID), (CLS, CLS_ID)
        )
        return tokenizer

    return cached("wordpiece", documents, vocab_size, train)


@dataclasses.dataclass(frozen=True)
class Masking:
    """Turns a window of tokens into [CLS] window [SEP] with some of it masked.

    Of 15 % of the positions, 80 % become [MASK], 10 % another token and 10 % stay.
    Their number is the same in every record, so that shapes are.

    Attributes:
        vocab_size: Of a vocabulary as `wordpiece` learns it: ids are below it, and the
            special tokens' come first.
    """

    vocab_size: int

    def __call__(self, record: Record, generator: np.random.Generator) -> Record:
        """Returns "tokens" (L), masked "positions" (K) and their "targets" (K)."""
        tokens_L = np.concatenate([[CLS_ID], record["tokens"], [SEP_ID]])
        count = max(1, round(RATE * len(tokens_L)))
        # Special tokens come last: they are taken only when there is too little else.
        is_special_L = tokens_L < len(SPECIAL)
        order_L = np.argsort(generator.random(len(tokens_L)) + is_special_L)
        positions_K = np.sort(order_L[:count])
        targets_K = tokens_L[positions_K]
        kind_K = generator.random(count)
        other_K = generator.integers(len(SPECIAL), self.vocab_size, count)
        tokens_L[positions_K] = np.where(
            kind_K < 0.8, MASK_ID, np.where(kind_K < 0.9, other_K, targets_K)
        )
        return {
            **record,
            "tokens": tokens_L.astype(np.int32),
            "positions": positions_K.astype(np.int32),
            "targets": targets_K.astype(np.int32),
        }

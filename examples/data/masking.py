"""BERT's vocabulary, and its masking, drawn anew each time a record is read.

References:
    Devlin et al., BERT, 2018 (80 / 10 / 10); Liu et al., RoBERTa, 2019 (dynamic).
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import tokenizers
from tokenizers import Tokenizer

from data.tokenization import cached, id_of
from task import Record

PAD, UNKNOWN, CLS, SEP, MASK = SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
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
            *((t, id_of(tokenizer, t)) for t in (SEP, CLS))
        )
        return tokenizer

    return cached("wordpiece", documents, vocab_size, train)


@dataclasses.dataclass(frozen=True)
class Masking:
    """Turns a window of tokens into [CLS] window [SEP] with some of it masked.

    Of 15 % of the positions, 80 % become [MASK], 10 % another token and 10 % stay.
    Their number is the same in every record, so that shapes are.

    Attributes:
        cls: Id of [CLS].
        sep: Id of [SEP].
        mask: Id of [MASK].
        special: Ids below it are special tokens, neither masked nor put in.
        vocab_size: Ids are below it.
    """

    cls: int
    sep: int
    mask: int
    special: int
    vocab_size: int

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "Masking":
        """Returns the masking for a tokenizer with BERT's special tokens first."""
        return Masking(
            cls=id_of(tokenizer, CLS),
            sep=id_of(tokenizer, SEP),
            mask=id_of(tokenizer, MASK),
            special=len(SPECIAL),
            vocab_size=tokenizer.get_vocab_size(),
        )

    @classmethod
    def of_learnt(cls, vocab_size: int) -> "Masking":
        """Returns the masking for a vocabulary that `wordpiece` would learn."""
        cls_id, sep, mask = map(SPECIAL.index, (CLS, SEP, MASK))
        return Masking(cls_id, sep, mask, len(SPECIAL), vocab_size)

    def __call__(self, record: Record, generator: np.random.Generator) -> Record:
        """Returns "tokens" (L), masked "positions" (K) and their "targets" (K)."""
        tokens_L = np.concatenate([[self.cls], record["tokens"], [self.sep]])
        count = max(1, round(RATE * len(tokens_L)))
        # Special tokens come last: they are taken only when there is too little else.
        is_special_L = tokens_L < self.special
        order_L = np.argsort(generator.random(len(tokens_L)) + is_special_L)
        positions_K = np.sort(order_L[:count])
        targets_K = tokens_L[positions_K]
        kind_K = generator.random(count)
        other_K = generator.integers(self.special, self.vocab_size, count)
        tokens_L[positions_K] = np.where(
            kind_K < 0.8, self.mask, np.where(kind_K < 0.9, other_K, targets_K)
        )
        return {
            **record,
            "tokens": tokens_L.astype(np.int32),
            "positions": positions_K.astype(np.int32),
            "targets": targets_K.astype(np.int32),
        }

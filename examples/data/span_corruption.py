"""T5's vocabulary, and its span corruption, drawn anew when a record is read.

References:
    Raffel et al., Exploring the Limits of Transfer Learning with a Unified Text-to-Text
    Transformer, 2019, section 3.1.4.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import tokenizers
from tokenizers import Tokenizer

from data.tokenization import cached
from task import Record, UserError

PAD, END, UNKNOWN = SPECIAL = ("<pad>", "</s>", "<unk>")
END_ID = SPECIAL.index(END)
SENTINELS = tuple(f"<extra_id_{k}>" for k in range(100))
RATE = 0.15
MEAN_LENGTH = 3
SAMPLE = 12_000_000  # Characters that a vocabulary is learnt from, in a minute.


def unigram(documents: Sequence[str], vocab_size: int) -> Tokenizer:
    """Returns T5's kind of tokenizer: Unigram, special tokens first, sentinels last.

    <extra_id_0> has the highest id, <extra_id_1> the one below, and so on.
    """

    def train(documents: Sequence[str]) -> Tokenizer:
        tokenizer = Tokenizer(tokenizers.models.Unigram())
        tokenizer.normalizer = tokenizers.normalizers.Sequence(
            [
                tokenizers.normalizers.NFKC(),
                tokenizers.normalizers.Replace(tokenizers.Regex(r"\s+"), " "),
            ]
        )
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
            [
                tokenizers.pre_tokenizers.Metaspace(),
                # The model has </s> among its pieces; no text is to become that.
                tokenizers.pre_tokenizers.Split("<", "isolated"),
            ]
        )
        tokenizer.decoder = tokenizers.decoders.Metaspace()
        trainer = tokenizers.trainers.UnigramTrainer(
            vocab_size=max(vocab_size - len(SENTINELS), 1),
            special_tokens=list(SPECIAL),
            unk_token=UNKNOWN,
            show_progress=False,
        )
        try:
            tokenizer.train_from_iterator(documents, trainer)
        except Exception as error:  # `tokenizers` raises nothing more specific.
            raise UserError(f"--vocab-size {vocab_size}: {error}") from error
        tokenizer.add_special_tokens(list(reversed(SENTINELS)))
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"$A {END}",
            pair=f"$A {END} $B {END}",
            special_tokens=[(END, END_ID)],
        )
        return tokenizer

    return cached("unigram", documents, vocab_size, train, enough=SAMPLE)


@dataclasses.dataclass(frozen=True)
class SpanCorruption:
    """Cuts random spans out of a window of tokens.

    With `The quick brown fox jumps over` cut at `quick` and `jumps over`, inputs are
    `The <extra_id_0> brown fox <extra_id_1> </s>` and targets are `<extra_id_0> quick
    <extra_id_1> jumps over </s>`. The number of spans and of tokens in them is the same
    in every record, so that shapes are.

    Attributes:
        length: Tokens in a window.
        sentinels: Ids of <extra_id_0>, <extra_id_1>, ...
    """

    length: int
    sentinels: Sequence[int]

    @classmethod
    def fitting(cls, inputs: int, vocab_size: int) -> "SpanCorruption":
        """Returns the longest windows of which at most `inputs` tokens become inputs.

        Args:
            inputs: Tokens that the model reads.
            vocab_size: Of a vocabulary as `unigram` learns it.

        Raises:
            UserError: So few or many that there are no spans, or too few sentinels.
        """
        sentinels = range(vocab_size - 1, vocab_size - 1 - len(SENTINELS), -1)
        fitting = [
            corruption
            for length in range(5, 2 * inputs)
            if (corruption := cls(length, sentinels)).inputs <= inputs
        ]
        if not fitting or fitting[-1].spans > len(sentinels):
            raise UserError(f"--seq-len {inputs}: must be from 6 to about 1,800")
        return fitting[-1]

    @property
    def noise(self) -> int:
        """Tokens cut out of a window."""
        return max(1, round(RATE * self.length))

    @property
    def spans(self) -> int:
        """Spans that they are in."""
        return max(1, round(self.noise / MEAN_LENGTH))

    @property
    def inputs(self) -> int:
        """Length of the inputs, sentinels and </s> included."""
        return self.length - self.noise + self.spans + 1

    def __call__(self, record: Record, generator: np.random.Generator) -> Record:
        """Returns "inputs" (L) and "targets" (M)."""
        tokens = record["tokens"]
        kept = _random_parts(self.length - self.noise, self.spans, generator)
        cut = _random_parts(self.noise, self.spans, generator)
        is_cut = np.repeat([False, True] * self.spans, np.stack([kept, cut], 1).ravel())
        sentinels = self.sentinels[: self.spans]
        inputs = np.insert(tokens[~is_cut], np.cumsum(kept), sentinels)
        targets = np.insert(tokens[is_cut], np.cumsum(cut) - cut, sentinels)
        rest = {name: record[name] for name in record if name != "tokens"}
        return {
            **rest,
            "inputs": np.append(inputs, END_ID).astype(np.int32),
            "targets": np.append(targets, END_ID).astype(np.int32),
        }


def _random_parts(total: int, parts: int, generator: np.random.Generator) -> np.ndarray:
    """Divides a number into so many of at least 1; each way is as likely."""
    cuts = generator.choice(total - 1, parts - 1, replace=False) + 1
    return np.diff(np.sort(cuts), prepend=0, append=total)

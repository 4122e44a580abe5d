"""Masked language modelling with BERT."""

import dataclasses

import jax.numpy as jnp
import optax
from flax import nnx
from jax.typing import DTypeLike

from data import corpus, tokenization
from data.masking import SEP, Masking, wordpiece
from data.pipeline import Windows, blank
from models import bert
from task import Batch, Count, Mean, Task, UserError, compute_dtype, of_size

BOTH_ENDS = 2  # Places that [CLS] and [SEP] take.


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """Options for the model.

    Attributes:
        size: nano, tiny, mini, small, base, large or 4b.
        vocab_size: Tokens to learn, from 100 million characters of the text at most;
            by default the size's own.
    """

    size: str = "nano"
    vocab_size: Count | None = None


def make_task(
    model: ModelOptions,
    text: corpus.TextOptions | None,
    seq_len: int | None = None,
    dtype: DTypeLike | None = None,
) -> Task:
    """Returns the task; arguments are as of `tasks.gpt2.make_task`."""
    config = of_size(bert.SIZES, model.size)
    length = seq_len or config.max_position_embeddings
    if length <= BOTH_ENDS:
        raise UserError(f"--seq-len {length}: must be at least {BOTH_ENDS + 1}")
    config = dataclasses.replace(
        config,
        vocab_size=model.vocab_size or config.vocab_size,
        max_position_embeddings=max(length, config.max_position_embeddings),
        dtype=dtype or compute_dtype(),
    )
    task = Task(
        name=f"BERT {model.size}",
        make_model=lambda rngs: bert.MaskedLM(config, rngs=rngs),
        loss_fn=masked_token_loss,
        train=blank(length - BOTH_ENDS, overlap=0),
        validation=blank(length - BOTH_ENDS, overlap=0),
        tokens_per_record=length,
        transform=Masking(config.vocab_size),
    )
    if text is None:
        return task
    tokenizer, train, validation = tokenization.learn_and_encode(
        text, wordpiece, config.vocab_size, SEP
    )
    losses = tokenization.cross_entropies(train, validation, config.vocab_size)
    return dataclasses.replace(
        task,
        train=Windows(train, length - BOTH_ENDS, overlap=0),
        validation=Windows(validation, length - BOTH_ENDS, overlap=0),
        transform=Masking(tokenizer.get_vocab_size()),
        references={"unigram": losses["unigram"]},
        options=dataclasses.asdict(model) | dataclasses.asdict(text),
        files={"tokenizer.json": tokenizer.to_str(pretty=True)},
    )


def masked_token_loss(
    model: bert.MaskedLM, batch: Batch, rngs: nnx.Rngs | None = None
) -> dict[str, Mean]:
    """Cross-entropy in nats of each masked token, and how many are guessed right.

    `batch` has "tokens" (B, L), "positions" (B, K) and, there, "targets" (B, K).
    """
    logits_BxKxV = model(batch["tokens"], batch["positions"], rngs)
    targets_BxK = batch["targets"]
    loss_BxK = optax.softmax_cross_entropy_with_integer_labels(
        logits_BxKxV, targets_BxK
    )
    right_BxK = (logits_BxKxV.argmax(-1) == targets_BxK).astype(jnp.float32)
    weight_BxK = jnp.broadcast_to(batch["weight"][:, None], loss_BxK.shape)
    count = jnp.sum(weight_BxK)
    return {
        "loss": Mean(jnp.sum(loss_BxK * weight_BxK), count),
        "accuracy": Mean(jnp.sum(right_BxK * weight_BxK), count),
    }

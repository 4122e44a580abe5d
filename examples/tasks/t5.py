"""Span corruption with T5."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.typing import DTypeLike

from data import corpus, tokenization
from data.pipeline import Windows, blank
from data.span_corruption import END, SpanCorruption, unigram
from models import t5
from task import Batch, Count, Mean, Records, Task, compute_dtype, of_size


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """Options for the model.

    Attributes:
        size: nano, tiny, small, base or large; the last four of version 1.0 too, as in
            small-v1.0.
        vocab_size: Tokens to learn, 100 sentinels included, from 12 million characters
            of the text at most; by default the size's own.
    """

    size: str = "tiny"
    vocab_size: Count | None = None


def make_task(
    model: ModelOptions,
    text: corpus.TextOptions | None,
    seq_len: int | None = None,
    dtype: DTypeLike | None = None,
) -> Task:
    """Returns the task; arguments are as of `tasks.gpt2.make_task`."""
    config = of_size(t5.SIZES, model.size)
    config = dataclasses.replace(
        config,
        vocab_size=model.vocab_size or config.vocab_size,
        dtype=dtype or compute_dtype(),
    )
    inputs = seq_len or t5.INPUTS[model.size]
    corruption = SpanCorruption.fitting(inputs, config.vocab_size)
    task = Task(
        name=f"T5 {model.size}",
        make_model=lambda rngs: t5.T5(config, rngs=rngs),
        loss_fn=target_token_loss,
        train=blank(corruption.length, overlap=0),
        validation=blank(corruption.length, overlap=0),
        tokens_per_record=corruption.length,
        transform=corruption,
    )
    if text is None:
        return task
    tokenizer, *tokens = tokenization.learn_and_encode(
        text, unigram, config.vocab_size, END
    )
    corruption = SpanCorruption.fitting(inputs, tokenizer.get_vocab_size())
    train, validation = (Windows(part, corruption.length, overlap=0) for part in tokens)

    def targets(records: Records) -> np.ndarray:
        generator = np.random.default_rng(0)
        corrupted = (corruption(records[k], generator) for k in range(len(records)))
        return np.concatenate([record["targets"] for record in corrupted])

    return dataclasses.replace(
        task,
        train=train,
        validation=validation,
        transform=corruption,
        references=tokenization.cross_entropies(
            targets(train), targets(validation), config.vocab_size
        ),
        options=dataclasses.asdict(model) | dataclasses.asdict(text),
        files={"tokenizer.json": tokenizer.to_str(pretty=True)},
    )


def target_token_loss(
    model: t5.T5, batch: Batch, rngs: nnx.Rngs | None = None
) -> dict[str, Mean]:
    """Cross-entropy in nats of each of the "targets" (B, M) given "inputs" (B, L)."""
    del rngs  # No dropout: version 1.1 was pretrained without.
    targets_BxM = batch["targets"]
    logits_BxMxV = model(batch["inputs"], model.decoder_inputs(targets_BxM))
    loss_BxM = optax.softmax_cross_entropy_with_integer_labels(
        logits_BxMxV, targets_BxM
    )
    weight_BxM = jnp.broadcast_to(batch["weight"][:, None], loss_BxM.shape)
    return {"loss": Mean(jnp.sum(loss_BxM * weight_BxM), jnp.sum(weight_BxM))}

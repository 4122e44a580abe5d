"""Next-token prediction with GPT-2."""

import dataclasses

import jax.numpy as jnp
import optax
from flax import nnx
from jax.typing import DTypeLike
from tokenizers import Tokenizer

from data import corpus, tokenization
from data.pipeline import Windows, blank
from data.tokenization import END_OF_TEXT, id_of
from models import gpt2
from task import Batch, Count, Mean, Task, UserError, compute_dtype, of_size


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """Options for the model.

    Attributes:
        size: nano, tiny, small, medium, large or xl.
        vocab_size: Tokens to learn, from 100 million characters of the text at most;
            by default the size's own.
        prompt: What the text sample at the end continues.
    """

    size: str = "tiny"
    vocab_size: Count | None = None
    prompt: str = ""


def make_task(
    model: ModelOptions,
    text: corpus.TextOptions | None,
    seq_len: int | None = None,
    dtype: DTypeLike | None = None,
) -> Task:
    """Returns the task, with a vocabulary learnt from the text.

    Args:
        model: Which model.
        text: Which text; None for a blank record, to compile with.
        seq_len: Tokens per sequence, by default the model's most.
        dtype: To compute in, by default what suits the devices.
    """
    config = of_size(gpt2.SIZES, model.size)
    length = seq_len or config.n_positions
    config = dataclasses.replace(
        config,
        vocab_size=model.vocab_size or config.vocab_size,
        n_positions=max(length, config.n_positions),
        dtype=dtype or compute_dtype(),
    )
    task = Task(
        name=f"GPT-2 {model.size}",
        make_model=lambda rngs: gpt2.GPT2(config, rngs=rngs),
        loss_fn=next_token_loss,
        train=blank(length),
        validation=blank(length),
        tokens_per_record=length,
    )
    if text is None:
        return task
    tokenizer, train, validation = tokenization.learn_and_encode(
        text, tokenization.byte_level_bpe, config.vocab_size, END_OF_TEXT
    )
    prompt = len(_encode(tokenizer, model.prompt))
    if prompt > length:
        raise UserError(
            f"--prompt: has {prompt} tokens, its start included; must have {length} at "
            "most, as many as a sequence"
        )
    return dataclasses.replace(
        task,
        train=Windows(train, length),
        validation=Windows(validation, length),
        references=tokenization.cross_entropies(train, validation, config.vocab_size),
        options=dataclasses.asdict(model) | dataclasses.asdict(text),
        files={"tokenizer.json": tokenizer.to_str(pretty=True)},
    )


def next_token_loss(
    model: gpt2.GPT2, batch: Batch, rngs: nnx.Rngs | None = None
) -> dict[str, Mean]:
    """Cross-entropy in nats of each token given those before it."""
    del rngs  # No dropout: a single pass over text does not overfit.
    tokens_BxL1 = batch["tokens"]
    logits_BxLxV = model(tokens_BxL1[:, :-1])
    loss_BxL = optax.softmax_cross_entropy_with_integer_labels(
        logits_BxLxV, tokens_BxL1[:, 1:]
    )
    weight_BxL = jnp.broadcast_to(batch["weight"][:, None], loss_BxL.shape)
    return {"loss": Mean(jnp.sum(loss_BxL * weight_BxL), jnp.sum(weight_BxL))}


def continue_text(model: gpt2.GPT2, task: Task, prompt: str, seed: int) -> str:
    """Returns a prompt and what the task's model continues it with."""
    tokenizer = Tokenizer.from_str(task.files["tokenizer.json"])
    tokens = _encode(tokenizer, prompt)
    tokens = gpt2.sample(model, tokens, task.tokens_per_record, seed=seed)
    text: str = tokenizer.decode(tokens)
    return text


def _encode(tokenizer: Tokenizer, prompt: str) -> list[int]:
    return [id_of(tokenizer, END_OF_TEXT), *tokenizer.encode(prompt).ids]

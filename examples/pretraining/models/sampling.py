"""Text continued by a trained language model."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from tokenizers import Tokenizer

from pretraining.data.tokenization import END_OF_TEXT, id_of
from pretraining.errors import UserError
from pretraining.task import Task


def check_prompt(tokenizer: Tokenizer, prompt: str, length: int) -> None:
    """Raises UserError unless a prompt fits in a sequence of that length."""
    size = len(_encode(tokenizer, prompt))
    if size > length:
        raise UserError(
            f"--prompt: has {size} tokens, its start included; must have {length} at "
            "most, as many as a sequence"
        )


def continue_text(model: nnx.Module, task: Task, prompt: str, seed: int) -> str:
    """Returns a prompt and what the task's model continues it with."""
    tokenizer = Tokenizer.from_str(task.files["tokenizer.json"])
    tokens = sample(
        model, _encode(tokenizer, prompt), task.tokens_per_record, seed=seed
    )
    text: str = tokenizer.decode(tokens)
    return text


def _encode(tokenizer: Tokenizer, prompt: str) -> list[int]:
    ids: list[int] = tokenizer.encode(prompt).ids
    return [id_of(tokenizer, END_OF_TEXT), *ids]


def sample(
    model: Callable[[jax.Array], jax.Array],
    prompt: Sequence[int],
    length: int,
    *,
    seed: int = 0,
    temperature: float = 0.8,
) -> list[int]:
    """Continues `prompt` to `length` tokens.

    Each token runs the model on the whole window: simple, and quick enough for a few
    lines of text.
    """
    graphdef, params = nnx.split(model)
    tokens_1xL = jnp.zeros((1, length), jnp.int32)
    tokens_1xL = tokens_1xL.at[0, : len(prompt)].set(jnp.asarray(prompt, jnp.int32))

    @jax.jit
    def continue_prompt(params: nnx.State, tokens_1xL: jax.Array) -> jax.Array:
        model = nnx.merge(graphdef, params)

        def add_token(index: jax.Array, tokens_1xL: jax.Array) -> jax.Array:
            logits_V = model(tokens_1xL)[0, index - 1] / temperature
            key = jax.random.fold_in(jax.random.key(seed), index)
            token = jax.random.categorical(key, logits_V).astype(jnp.int32)
            return tokens_1xL.at[0, index].set(token)

        return jax.lax.fori_loop(len(prompt), length, add_token, tokens_1xL)

    return continue_prompt(params, tokens_1xL)[0].tolist()

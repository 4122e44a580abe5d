"""GPT-2 in Flax NNX: pre-LN, learned positions, tanh-GELU, tied embeddings.

Modules and sizes are named as in Hugging Face's `GPT2LMHeadModel`, and kernels are
(in, out) matrices as there. Suffixes give shapes: B batch, L length, D width, N heads,
H head size, V vocabulary.

References:
    Radford et al., Language Models are Unsupervised Multitask Learners, 2019.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike


@dataclasses.dataclass(frozen=True)
class GPT2Config:
    """Sizes of a GPT-2; the defaults are the published small one."""

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    dtype: DTypeLike = jnp.float32  # of the activations; parameters are float32

    def __post_init__(self) -> None:
        if self.n_embd % self.n_head:
            raise ValueError(
                f"n_embd {self.n_embd} is no multiple of n_head {self.n_head}"
            )


SIZES = {
    "nano": GPT2Config(vocab_size=512, n_positions=64, n_embd=64, n_layer=2, n_head=2),
    "tiny": GPT2Config(vocab_size=512, n_positions=128, n_embd=96, n_layer=2, n_head=3),
    "small": GPT2Config(),
    "medium": GPT2Config(n_embd=1024, n_layer=24, n_head=16),
    "large": GPT2Config(n_embd=1280, n_layer=36, n_head=20),
    "xl": GPT2Config(n_embd=1600, n_layer=48, n_head=25),
}


class Attention(nnx.Module):
    """Causal multi-head self-attention."""

    def __init__(self, config: GPT2Config, *, rngs: nnx.Rngs):
        width = config.n_embd
        self.n_head = config.n_head
        self.c_attn = _linear(width, 3 * width, config, rngs)
        self.c_proj = _linear(width, width, config, rngs, residual=True)

    def __call__(self, x_BxLxD: jax.Array) -> jax.Array:
        B, L, D = x_BxLxD.shape
        qkv_BxLx3xNxH = self.c_attn(x_BxLxD).reshape(B, L, 3, self.n_head, -1)
        q_BxLxNxH, k_BxLxNxH, v_BxLxNxH = jnp.unstack(qkv_BxLx3xNxH, axis=2)
        q_BxLxNxH = q_BxLxNxH * q_BxLxNxH.shape[-1] ** -0.5
        scores_BxNxLxL = jnp.einsum(
            "blnh,bmnh->bnlm", q_BxLxNxH, k_BxLxNxH, preferred_element_type=jnp.float32
        )
        causal_1x1xLxL = jnp.tril(jnp.ones((1, 1, L, L), bool))
        weights_BxNxLxL = jax.nn.softmax(
            jnp.where(causal_1x1xLxL, scores_BxNxLxL, -jnp.inf)
        )
        out_BxLxNxH = jnp.einsum(
            "bnlm,bmnh->blnh", weights_BxNxLxL.astype(x_BxLxD.dtype), v_BxLxNxH
        )
        return self.c_proj(out_BxLxNxH.reshape(B, L, D))


class MLP(nnx.Module):
    """The position-wise network, four times as wide inside."""

    def __init__(self, config: GPT2Config, *, rngs: nnx.Rngs):
        width = config.n_embd
        self.c_fc = _linear(width, 4 * width, config, rngs)
        self.c_proj = _linear(4 * width, width, config, rngs, residual=True)

    def __call__(self, x_BxLxD: jax.Array) -> jax.Array:
        return self.c_proj(jax.nn.gelu(self.c_fc(x_BxLxD), approximate=True))


class Block(nnx.Module):
    """One pre-LN layer."""

    def __init__(self, config: GPT2Config, *, rngs: nnx.Rngs):
        self.ln_1 = _layer_norm(config, rngs)
        self.attn = Attention(config, rngs=rngs)
        self.ln_2 = _layer_norm(config, rngs)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(self, x_BxLxD: jax.Array) -> jax.Array:
        x_BxLxD = x_BxLxD + self.attn(self.ln_1(x_BxLxD))
        return x_BxLxD + self.mlp(self.ln_2(x_BxLxD))


class GPT2(nnx.Module):
    """Token ids (B, L) to next-token logits (B, L, V) in float32."""

    # What tensor parallelism splits: hidden units, the vocabulary, and the rows of what
    # joins the heads (the columns before it are queries, keys and values side by side).
    tensor_axes: ClassVar = {r"/c_fc/": -1, r"/c_proj/kernel$": -2, r"^wte/": -2}

    def __init__(self, config: GPT2Config, *, rngs: nnx.Rngs):
        self.config = config
        self.wte = _embedding(config.vocab_size, config, rngs)
        self.wpe = _embedding(config.n_positions, config, rngs)
        self.h = nnx.List([Block(config, rngs=rngs) for _ in range(config.n_layer)])
        self.ln_f = _layer_norm(config, rngs)

    def __call__(self, tokens_BxL: jax.Array) -> jax.Array:
        positions_1xL = jnp.arange(tokens_BxL.shape[1])[None]
        x_BxLxD = self.wte(tokens_BxL) + self.wpe(positions_1xL)
        for block in self.h:
            x_BxLxD = block(x_BxLxD)
        x_BxLxD = self.ln_f(x_BxLxD)
        wte_VxD = self.wte.embedding[...].astype(self.config.dtype)
        return jnp.einsum(
            "bld,vd->blv", x_BxLxD, wte_VxD, preferred_element_type=jnp.float32
        )


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


def _linear(
    inputs: int,
    outputs: int,
    config: GPT2Config,
    rngs: nnx.Rngs,
    *,
    residual: bool = False,
) -> nnx.Linear:
    # Each layer adds two terms to the residual stream; this keeps its variance.
    scale = (2 * config.n_layer) ** -0.5 if residual else 1.0
    init = nnx.initializers.normal(config.initializer_range * scale)
    return nnx.Linear(inputs, outputs, kernel_init=init, dtype=config.dtype, rngs=rngs)


def _embedding(entries: int, config: GPT2Config, rngs: nnx.Rngs) -> nnx.Embed:
    init = nnx.initializers.normal(config.initializer_range)
    return nnx.Embed(
        entries, config.n_embd, embedding_init=init, dtype=config.dtype, rngs=rngs
    )


def _layer_norm(config: GPT2Config, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(
        config.n_embd, epsilon=config.layer_norm_epsilon, dtype=config.dtype, rngs=rngs
    )

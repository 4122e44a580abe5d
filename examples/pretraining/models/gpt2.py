"""GPT-2 in Flax NNX: pre-LN, learned positions, tanh-GELU, tied embeddings.

Modules and sizes are named as in Hugging Face's `GPT2LMHeadModel`, and kernels are
(in, out) matrices as there. Suffixes give shapes: B batch, L length, D width, N heads,
H head size, V vocabulary.

References:
    Radford et al., Language Models are Unsupervised Multitask Learners, 2019.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.typing import DTypeLike

from pretraining.models.hugging_face import Format
from pretraining.task import Batch, Mean


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


SIZES = {
    "nano": GPT2Config(vocab_size=512, n_positions=64, n_embd=64, n_layer=2, n_head=2),
    "tiny": GPT2Config(vocab_size=512, n_positions=128, n_embd=96, n_layer=2, n_head=3),
    "small": GPT2Config(),
    "medium": GPT2Config(n_embd=1024, n_layer=24, n_head=16),
    "large": GPT2Config(n_embd=1280, n_layer=36, n_head=20),
    "xl": GPT2Config(n_embd=1600, n_layer=48, n_head=25),
}


HUGGING_FACE = Format(
    "gpt2",
    "GPT2LMHeadModel",
    GPT2Config,
    {"activation_function": "gelu_new", "tie_word_embeddings": True},
    "transformer.",
    {"^": "transformer."},
    transposed=False,
    implied={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False},
    heads=("n_embd", "n_head"),
)


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


def next_token_loss(
    model: GPT2, batch: Batch, rngs: nnx.Rngs | None = None
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
        config.n_embd,
        epsilon=config.layer_norm_epsilon,
        dtype=config.dtype,
        rngs=rngs,
    )

"""BERT in Flax NNX: post-LN, segment embeddings, a head with tied weights.

Sizes are named as in Hugging Face's `config.json`; kernels are (in, out) matrices.
Suffixes give shapes: B batch, L length, K masked positions, D width, N heads, H head
size, V vocabulary.

References:
    Devlin et al., BERT: Pre-training of Deep Bidirectional Transformers for Language
    Understanding, 2018.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike


@dataclasses.dataclass(frozen=True)
class BERTConfig:
    """Sizes of a BERT; the defaults are the published base one."""

    vocab_size: int = 30522
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    hidden_dropout_prob: float = 0.0  # of embeddings and of each sublayer's output
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    dtype: DTypeLike = jnp.float32  # of the activations; parameters are float32

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is no multiple of num_attention_heads "
                f"{self.num_attention_heads}"
            )


def _size(width: int, layers: int, heads: int, **others: Any) -> BERTConfig:
    return BERTConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        **others,
    )


SIZES = {
    "nano": _size(64, 2, 2, vocab_size=128, max_position_embeddings=16),
    "tiny": _size(128, 2, 2, vocab_size=2048, max_position_embeddings=128),
    "mini": _size(256, 4, 4),
    "small": _size(512, 4, 8),
    "base": _size(768, 12, 12),
    "large": _size(1024, 24, 16),
    "4b": _size(2560, 48, 40),  # Megatron-LM's 3.9 billion
}


class Attention(nnx.Module):
    """Multi-head self-attention in both directions."""

    def __init__(self, config: BERTConfig, *, rngs: nnx.Rngs):
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.query = _linear(width, width, config, rngs)
        self.key = _linear(width, width, config, rngs)
        self.value = _linear(width, width, config, rngs)
        self.output = _linear(width, width, config, rngs)

    def __call__(self, x_BxLxD: jax.Array, mask_Bx1x1xL: jax.Array) -> jax.Array:
        B, L, D = x_BxLxD.shape
        q_BxLxNxH, k_BxLxNxH, v_BxLxNxH = (
            project(x_BxLxD).reshape(B, L, self.heads, -1)
            for project in (self.query, self.key, self.value)
        )
        q_BxLxNxH = q_BxLxNxH * q_BxLxNxH.shape[-1] ** -0.5
        scores_BxNxLxL = jnp.einsum(
            "blnh,bmnh->bnlm", q_BxLxNxH, k_BxLxNxH, preferred_element_type=jnp.float32
        )
        weights_BxNxLxL = jax.nn.softmax(
            jnp.where(mask_Bx1x1xL, scores_BxNxLxL, -jnp.inf)
        )
        out_BxLxNxH = jnp.einsum(
            "bnlm,bmnh->blnh", weights_BxNxLxL.astype(x_BxLxD.dtype), v_BxLxNxH
        )
        return self.output(out_BxLxNxH.reshape(B, L, D))


class Layer(nnx.Module):
    """One post-LN layer: each sum is normalised."""

    def __init__(self, config: BERTConfig, *, rngs: nnx.Rngs):
        width, inner = config.hidden_size, config.intermediate_size
        self.attention = Attention(config, rngs=rngs)
        self.attention_norm = _layer_norm(config, rngs)
        self.intermediate = _linear(width, inner, config, rngs)
        self.output = _linear(inner, width, config, rngs)
        self.output_norm = _layer_norm(config, rngs)
        self.dropout = nnx.Dropout(config.hidden_dropout_prob)

    def __call__(
        self, x_BxLxD: jax.Array, mask_Bx1x1xL: jax.Array, rngs: nnx.Rngs | None
    ) -> jax.Array:
        attended_BxLxD = self.attention(x_BxLxD, mask_Bx1x1xL)
        attended_BxLxD = _drop(self.dropout, attended_BxLxD, rngs)
        x_BxLxD = self.attention_norm(x_BxLxD + attended_BxLxD)
        inner_BxLxD = self.output(_gelu(self.intermediate(x_BxLxD)))
        return self.output_norm(x_BxLxD + _drop(self.dropout, inner_BxLxD, rngs))


class BERT(nnx.Module):
    """Token ids (B, L) to hidden states (B, L, D).

    `segments_BxL` tells a pair's first text (0, the default) from its second (1);
    `mask_BxL` is False where there is only padding; `rngs` turns dropout on.
    """

    def __init__(self, config: BERTConfig, *, rngs: nnx.Rngs):
        self.word_embeddings = _embedding(config.vocab_size, config, rngs)
        self.position_embeddings = _embedding(
            config.max_position_embeddings, config, rngs
        )
        self.token_type_embeddings = _embedding(config.type_vocab_size, config, rngs)
        self.embeddings_norm = _layer_norm(config, rngs)
        self.dropout = nnx.Dropout(config.hidden_dropout_prob)
        self.layer = nnx.List(
            [Layer(config, rngs=rngs) for _ in range(config.num_hidden_layers)]
        )

    def __call__(
        self,
        tokens_BxL: jax.Array,
        segments_BxL: jax.Array | None = None,
        mask_BxL: jax.Array | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> jax.Array:
        if segments_BxL is None:
            segments_BxL = jnp.zeros_like(tokens_BxL)
        if mask_BxL is None:
            mask_BxL = jnp.ones(tokens_BxL.shape, bool)
        positions_1xL = jnp.arange(tokens_BxL.shape[1])[None]
        x_BxLxD = self.embeddings_norm(
            self.word_embeddings(tokens_BxL)
            + self.position_embeddings(positions_1xL)
            + self.token_type_embeddings(segments_BxL)
        )
        x_BxLxD = _drop(self.dropout, x_BxLxD, rngs)
        for layer in self.layer:
            x_BxLxD = layer(x_BxLxD, mask_BxL[:, None, None], rngs)
        return x_BxLxD


class MaskedLM(nnx.Module):
    """A BERT and the head that predicts tokens.

    Called with token ids (B, L) and, to save work, the positions (B, K) that are wanted
    (all by default); returns logits (B, K, V) in float32.
    """

    # What tensor parallelism splits: heads, hidden units, the vocabulary.
    tensor_axes: ClassVar = {
        r"/(query|key|value|intermediate)/": -1,
        r"/output/kernel$": -2,
        r"/word_embeddings/": -2,
    }

    def __init__(self, config: BERTConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.bert = BERT(config, rngs=rngs)
        self.transform = _linear(config.hidden_size, config.hidden_size, config, rngs)
        self.transform_norm = _layer_norm(config, rngs)
        self.bias = nnx.Param(jnp.zeros(config.vocab_size))

    def __call__(
        self,
        tokens_BxL: jax.Array,
        positions_BxK: jax.Array | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> jax.Array:
        x_BxKxD = self.bert(tokens_BxL, rngs=rngs)
        if positions_BxK is not None:
            x_BxKxD = jnp.take_along_axis(x_BxKxD, positions_BxK[..., None], axis=1)
        x_BxKxD = self.transform_norm(_gelu(self.transform(x_BxKxD)))
        embedding_VxD = self.bert.word_embeddings.embedding[...]
        logits_BxKxV = jnp.einsum(
            "bkd,vd->bkv",
            x_BxKxD,
            embedding_VxD.astype(x_BxKxD.dtype),
            preferred_element_type=jnp.float32,
        )
        return logits_BxKxV + self.bias[...][None, None]


def _gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=False)


def _drop(dropout: nnx.Dropout, x: jax.Array, rngs: nnx.Rngs | None) -> jax.Array:
    return dropout(x, deterministic=rngs is None, rngs=rngs)


def _linear(
    inputs: int, outputs: int, config: BERTConfig, rngs: nnx.Rngs
) -> nnx.Linear:
    init = nnx.initializers.normal(config.initializer_range)
    return nnx.Linear(inputs, outputs, kernel_init=init, dtype=config.dtype, rngs=rngs)


def _embedding(entries: int, config: BERTConfig, rngs: nnx.Rngs) -> nnx.Embed:
    init = nnx.initializers.normal(config.initializer_range)
    return nnx.Embed(
        entries, config.hidden_size, embedding_init=init, dtype=config.dtype, rngs=rngs
    )


def _layer_norm(config: BERTConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(
        config.hidden_size, epsilon=config.layer_norm_eps, dtype=config.dtype, rngs=rngs
    )

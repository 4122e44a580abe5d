"""T5 in Flax NNX: encoder-decoder, RMSNorm, relative position buckets, no biases.

Version 1.1 has a gated GELU and its own output matrix; version 1.0 a ReLU and one
matrix for embeddings and output. Sizes are named as in Hugging Face's `config.json`;
kernels are (in, out) matrices. Suffixes give shapes: B batch, L input length, M target
length, D width, N heads, H head size, V vocabulary; Q and K are L or M.

References:
    Raffel et al., Exploring the Limits of Transfer Learning with a Unified Text-to-Text
    Transformer, 2019. Shazeer, GLU Variants Improve Transformer, 2020.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Sizes of a T5; the defaults are those of version 1.1, small."""

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 1024
    num_layers: int = 8
    num_decoder_layers: int = 8
    num_heads: int = 6
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    feed_forward_proj: str = "gated-gelu"
    tie_word_embeddings: bool = False
    scale_decoder_outputs: bool = False
    layer_norm_epsilon: float = 1e-6
    initializer_factor: float = 1.0
    decoder_start_token_id: int = 0
    dtype: DTypeLike = jnp.float32  # of the activations; parameters are float32

    def __post_init__(self) -> None:
        if self.feed_forward_proj not in ("relu", "gated-gelu"):
            raise ValueError(
                f"feed_forward_proj is {self.feed_forward_proj!r}; only 'relu' or "
                "'gated-gelu' is implemented"
            )


def _size(width: int, inner: int, layers: int, heads: int, **others: Any) -> T5Config:
    return T5Config(
        d_model=width,
        d_ff=inner,
        num_layers=layers,
        num_decoder_layers=layers,
        num_heads=heads,
        **others,
    )


VERSION_1_0: Any = dict(
    feed_forward_proj="relu", tie_word_embeddings=True, scale_decoder_outputs=True
)
SIZES = {
    "nano": _size(64, 128, 2, 2, d_kv=32, vocab_size=612),
    "tiny": _size(128, 256, 2, 4, d_kv=32, vocab_size=2176),
    "small": _size(512, 1024, 8, 6),
    "base": _size(768, 2048, 12, 12),
    "large": _size(1024, 2816, 24, 16),
    "tiny-v1.0": _size(128, 512, 2, 4, d_kv=32, vocab_size=2176, **VERSION_1_0),
    "small-v1.0": _size(512, 2048, 6, 8, **VERSION_1_0),
    "base-v1.0": _size(768, 3072, 12, 12, **VERSION_1_0),
    "large-v1.0": _size(1024, 4096, 24, 16, **VERSION_1_0),
}
# Input tokens, for want of a most: any number fits.
INPUTS = {size: 512 for size in SIZES} | {"nano": 64, "tiny": 128, "tiny-v1.0": 128}


class Attention(nnx.Module):
    """Multi-head attention with a bias for each pair of positions, unscaled."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        width, inner = config.d_model, config.num_heads * config.d_kv
        self.heads = config.num_heads
        # What 1/sqrt(H) does elsewhere is in the initial scale of the queries here.
        self.q = _linear(width, inner, (width * config.d_kv) ** -0.5, config, rngs)
        self.k = _linear(width, inner, width**-0.5, config, rngs)
        self.v = _linear(width, inner, width**-0.5, config, rngs)
        self.o = _linear(inner, width, inner**-0.5, config, rngs)

    def __call__(
        self, x_BxQxD: jax.Array, from_BxKxD: jax.Array, bias_1xNxQxK: jax.Array
    ) -> jax.Array:
        B, Q, _ = x_BxQxD.shape
        q_BxQxNxH = self.q(x_BxQxD).reshape(B, Q, self.heads, -1)
        k_BxKxNxH = self.k(from_BxKxD).reshape(B, -1, self.heads, q_BxQxNxH.shape[-1])
        v_BxKxNxH = self.v(from_BxKxD).reshape(k_BxKxNxH.shape)
        scores_BxNxQxK = jnp.einsum(
            "bqnh,bknh->bnqk", q_BxQxNxH, k_BxKxNxH, preferred_element_type=jnp.float32
        )
        weights_BxNxQxK = jax.nn.softmax(scores_BxNxQxK + bias_1xNxQxK)
        out_BxQxNxH = jnp.einsum(
            "bnqk,bknh->bqnh", weights_BxNxQxK.astype(x_BxQxD.dtype), v_BxKxNxH
        )
        return self.o(out_BxQxNxH.reshape(B, Q, -1))


class MLP(nnx.Module):
    """The position-wise network, gated in version 1.1."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        width, inner = config.d_model, config.d_ff
        self.gated = config.feed_forward_proj == "gated-gelu"
        if self.gated:
            self.wi_0 = _linear(width, inner, width**-0.5, config, rngs)
            self.wi_1 = _linear(width, inner, width**-0.5, config, rngs)
        else:
            self.wi = _linear(width, inner, width**-0.5, config, rngs)
        self.wo = _linear(inner, width, inner**-0.5, config, rngs)

    def __call__(self, x_BxLxD: jax.Array) -> jax.Array:
        if self.gated:
            gate = jax.nn.gelu(self.wi_0(x_BxLxD), approximate=True)
            return self.wo(gate * self.wi_1(x_BxLxD))
        return self.wo(jax.nn.relu(self.wi(x_BxLxD)))


class Block(nnx.Module):
    """One pre-norm layer; a decoder's attends to the encoder's output too."""

    def __init__(self, config: T5Config, *, decoder: bool, rngs: nnx.Rngs):
        self.attention_norm = _norm(config, rngs)
        self.attention = Attention(config, rngs=rngs)
        self.decoder = decoder
        if decoder:
            self.cross_attention_norm = _norm(config, rngs)
            self.cross_attention = Attention(config, rngs=rngs)
        self.mlp_norm = _norm(config, rngs)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(
        self,
        x_BxQxD: jax.Array,
        bias_1xNxQxQ: jax.Array,
        encoded_BxLxD: jax.Array | None,
    ) -> jax.Array:
        normed_BxQxD = self.attention_norm(x_BxQxD)
        x_BxQxD = x_BxQxD + self.attention(normed_BxQxD, normed_BxQxD, bias_1xNxQxQ)
        if self.decoder:
            assert encoded_BxLxD is not None
            no_bias_1x1x1x1 = jnp.zeros((1, 1, 1, 1))
            x_BxQxD = x_BxQxD + self.cross_attention(
                self.cross_attention_norm(x_BxQxD), encoded_BxLxD, no_bias_1x1x1x1
            )
        return x_BxQxD + self.mlp(self.mlp_norm(x_BxQxD))


class Stack(nnx.Module):
    """The encoder or the decoder: blocks that share one table of position biases."""

    def __init__(self, config: T5Config, *, decoder: bool, rngs: nnx.Rngs):
        self.config, self.decoder = config, decoder
        self.relative_attention_bias = _embedding(
            config.relative_attention_num_buckets,
            config.num_heads,
            config.d_model**-0.5,
            config,
            rngs,
        )
        layers = config.num_decoder_layers if decoder else config.num_layers
        self.block = nnx.List(
            [Block(config, decoder=decoder, rngs=rngs) for _ in range(layers)]
        )
        self.final_norm = _norm(config, rngs)

    def __call__(
        self, x_BxQxD: jax.Array, encoded_BxLxD: jax.Array | None = None
    ) -> jax.Array:
        bias_1xNxQxQ = self._position_bias(x_BxQxD.shape[1])
        for block in self.block:
            x_BxQxD = block(x_BxQxD, bias_1xNxQxQ, encoded_BxLxD)
        return self.final_norm(x_BxQxD)

    def _position_bias(self, length: int) -> jax.Array:
        distance_QxQ = np.arange(length)[None] - np.arange(length)[:, None]
        buckets_QxQ = relative_position_bucket(
            distance_QxQ,
            bidirectional=not self.decoder,
            buckets=self.config.relative_attention_num_buckets,
            max_distance=self.config.relative_attention_max_distance,
        )
        table = self.relative_attention_bias.embedding[...]
        bias_1xNxQxQ = table[buckets_QxQ].transpose(2, 0, 1)[None]
        if self.decoder:
            past_1x1xQxQ = (distance_QxQ <= 0)[None, None]
            bias_1xNxQxQ = jnp.where(past_1x1xQxQ, bias_1xNxQxQ, -jnp.inf)
        return bias_1xNxQxQ


class T5(nnx.Module):
    """Input ids (B, L) and decoder input ids (B, M) to logits (B, M, V) in float32.

    Decoder inputs are the targets shifted right: `decoder_inputs` makes them.
    """

    # What tensor parallelism splits: heads, hidden units, the vocabulary.
    tensor_axes: ClassVar = {
        r"/(q|k|v|wi|wi_0|wi_1)/|^lm_head/": -1,
        r"/(o|wo)/|^shared/": -2,
    }

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        self.config = config
        self.shared = _embedding(config.vocab_size, config.d_model, 1.0, config, rngs)
        self.encoder = Stack(config, decoder=False, rngs=rngs)
        self.decoder = Stack(config, decoder=True, rngs=rngs)
        if not config.tie_word_embeddings:
            # Hugging Face starts it at scale 1, from where logits have to shrink first.
            scale = config.d_model**-0.5
            self.lm_head = _linear(
                config.d_model, config.vocab_size, scale, config, rngs
            )

    def __call__(self, inputs_BxL: jax.Array, decoder_inputs_BxM: jax.Array):
        encoded_BxLxD = self.encoder(self.shared(inputs_BxL))
        x_BxMxD = self.decoder(self.shared(decoder_inputs_BxM), encoded_BxLxD)
        if self.config.scale_decoder_outputs:
            x_BxMxD = x_BxMxD * self.config.d_model**-0.5
        if self.config.tie_word_embeddings:
            output_DxV = self.shared.embedding[...].T
        else:
            output_DxV = self.lm_head.kernel[...]
        return jnp.einsum(
            "bmd,dv->bmv",
            x_BxMxD,
            output_DxV.astype(x_BxMxD.dtype),
            preferred_element_type=jnp.float32,
        )

    def decoder_inputs(self, targets_BxM: jax.Array) -> jax.Array:
        """Returns the targets shifted right, a start token before them."""
        start = self.config.decoder_start_token_id
        return jnp.pad(targets_BxM[:, :-1], ((0, 0), (1, 0)), constant_values=start)


def relative_position_bucket(
    distance: np.ndarray, *, bidirectional: bool, buckets: int, max_distance: int
) -> np.ndarray:
    """Numbers distances (key position less query position) by bucket.

    Half of the buckets hold one distance each, the others logarithmically more, up to
    `max_distance`; the last one takes all beyond. With `bidirectional` half of them all
    are for keys after the query; without, these share bucket 0 with the query itself.
    """
    first = np.zeros_like(distance)
    if bidirectional:
        buckets //= 2
        first = np.where(distance > 0, buckets, 0)
        distance = np.abs(distance)
    else:
        distance = np.maximum(-distance, 0)
    exact = buckets // 2
    # In float32, as elsewhere: at a bucket's edge the rounding decides.
    log_ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    log_ratio = log_ratio / np.float32(np.log(max_distance / exact))
    large = exact + (log_ratio * np.float32(buckets - exact)).astype(int)
    return first + np.where(distance < exact, distance, np.minimum(large, buckets - 1))


def _linear(
    inputs: int, outputs: int, scale: float, config: T5Config, rngs: nnx.Rngs
) -> nnx.Linear:
    return nnx.Linear(
        inputs,
        outputs,
        use_bias=False,
        kernel_init=nnx.initializers.normal(config.initializer_factor * scale),
        dtype=config.dtype,
        rngs=rngs,
    )


def _embedding(
    entries: int, width: int, scale: float, config: T5Config, rngs: nnx.Rngs
) -> nnx.Embed:
    init = nnx.initializers.normal(config.initializer_factor * scale)
    return nnx.Embed(entries, width, embedding_init=init, dtype=config.dtype, rngs=rngs)


def _norm(config: T5Config, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(
        config.d_model, epsilon=config.layer_norm_epsilon, dtype=config.dtype, rngs=rngs
    )

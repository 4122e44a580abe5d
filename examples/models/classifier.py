"""A BERT encoder that tells one kind of text from another."""

import jax
import jax.numpy as jnp
from flax import nnx

from models.bert import BERT, BERTConfig

POOLINGS = ("mean", "cls")


class Classifier(nnx.Module):
    """Padded token ids (B, L) and their mask (B, L) to logits (B, C) in float32.

    Args:
        config: The encoder's.
        classes: Number of classes, C.
        pooling: What stands for the text: the "mean" of its hidden states, or that of
            its first token, [CLS].
        rngs: For initial values.
    """

    def __init__(
        self, config: BERTConfig, classes: int, pooling: str, *, rngs: nnx.Rngs
    ):
        self.bert = BERT(config, rngs=rngs)
        self.pooling = pooling
        self.dropout = nnx.Dropout(config.hidden_dropout_prob)
        self.classifier = nnx.Linear(
            config.hidden_size,
            classes,
            kernel_init=nnx.initializers.normal(config.initializer_range),
            rngs=rngs,
        )

    def __call__(
        self, tokens_BxL: jax.Array, mask_BxL: jax.Array, rngs: nnx.Rngs | None = None
    ) -> jax.Array:
        x_BxLxD = self.bert(tokens_BxL, mask_BxL=mask_BxL, rngs=rngs)
        x_BxLxD = x_BxLxD.astype(jnp.float32)
        if self.pooling == "cls":
            pooled_BxD = x_BxLxD[:, 0]
        else:
            pooled_BxD = x_BxLxD.mean(1, where=mask_BxL[..., None])
        pooled_BxD = self.dropout(pooled_BxD, deterministic=rngs is None, rngs=rngs)
        return self.classifier(pooled_BxD)

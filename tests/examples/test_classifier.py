"""The classifier: padding, pooling, loss."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from flax import nnx

from pretraining.models import bert, classifier

CONFIG = bert.BERTConfig(
    vocab_size=11,
    max_position_embeddings=8,
    hidden_size=12,
    intermediate_size=20,
    num_hidden_layers=1,
    num_attention_heads=3,
)
TOKENS = jnp.arange(16).reshape(2, 8) % 11
MASK = jnp.arange(8)[None] < jnp.array([[8], [5]])


def make(pooling: str) -> classifier.Classifier:
    config = dataclasses.replace(CONFIG, initializer_range=0.5)
    return nnx.jit(
        lambda: classifier.Classifier(config, 3, pooling, rngs=nnx.Rngs(0))
    )()


@pytest.mark.parametrize("pooling", classifier.POOLINGS)
def test_padding_changes_nothing(pooling: str):
    model = make(pooling)
    logits_BxC = nnx.jit(model)(TOKENS, MASK)
    assert logits_BxC.shape == (2, 3)
    padded_BxC = nnx.jit(model)(TOKENS.at[1, 5:].set(10), MASK)
    np.testing.assert_array_equal(logits_BxC, padded_BxC)
    alone_1xC = nnx.jit(model)(TOKENS[1:, :5], MASK[1:, :5])
    np.testing.assert_allclose(alone_1xC, logits_BxC[1:], atol=1e-5)


def test_poolings_by_hand():
    hidden_BxLxD = nnx.jit(lambda m: m.bert(TOKENS, mask_BxL=MASK))(make("cls"))
    hidden_LxD = np.asarray(hidden_BxLxD)[1, :5]
    for pooling, pooled_D in ("cls", hidden_LxD[0]), ("mean", hidden_LxD.mean(0)):
        model = make(pooling)
        expected_C = pooled_D @ np.asarray(model.classifier.kernel[...])
        logits_BxC = nnx.jit(model)(TOKENS, MASK)
        np.testing.assert_allclose(logits_BxC[1], expected_C, atol=1e-5)


def test_loss_and_accuracy_count_rows_of_weight_one():
    model = make("mean")
    logits = np.asarray(nnx.jit(model)(TOKENS, MASK), np.float64)
    label = (logits.argmax(-1) + np.arange(2)).astype(np.int32) % 3
    losses = -scipy.special.log_softmax(logits, axis=-1)[[0, 1], label]
    for weight in [1, 1], [1, 0], [0, 1]:
        batch = {
            "tokens": TOKENS,
            "mask": MASK,
            "label": label,
            "weight": np.array(weight, np.float32),
        }
        means = nnx.jit(classifier.label_loss)(model, batch)
        assert means["loss"].total == pytest.approx(losses @ weight, rel=1e-5)
        assert means["accuracy"].total == weight[0]
        assert means["loss"].count == means["accuracy"].count == sum(weight)

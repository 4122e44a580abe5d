"""The BERT model: sizes, names, both directions, padding, segments, loss."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from flax import nnx

from pretraining.models import bert

CONFIG = bert.BERTConfig(
    vocab_size=11,
    max_position_embeddings=8,
    hidden_size=12,
    intermediate_size=20,
    num_hidden_layers=2,
    num_attention_heads=3,
)


@pytest.fixture(scope="module")
def model() -> bert.MaskedLM:
    return nnx.jit(lambda: bert.MaskedLM(CONFIG, rngs=nnx.Rngs(0)))()


@pytest.mark.parametrize(
    ("size", "parameters"),
    [("base", 109_514_298), ("large", 335_174_458), ("4b", 3_862_520_122)],
)
def test_sizes_are_the_published_ones(size: str, parameters: int):
    one, two = (count(bert.SIZES[size], layers) for layers in (1, 2))
    layers = bert.SIZES[size].num_hidden_layers
    assert one + (layers - 1) * (two - one) == parameters


@pytest.mark.nightly
def test_four_billion_in_full():
    assert count(bert.SIZES["4b"], 48) == 3_862_520_122


def count(config: bert.BERTConfig, layers: int) -> int:
    """Counts parameters without making any; each layer takes a while."""
    config = dataclasses.replace(config, num_hidden_layers=layers)
    model = nnx.eval_shape(lambda: bert.MaskedLM(config, rngs=nnx.Rngs(0)))
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_logits_are_float32_where_they_are_wanted(dtype: jnp.dtype):
    config = dataclasses.replace(CONFIG, dtype=dtype)
    tokens, positions = jnp.zeros((2, 5), jnp.int32), jnp.zeros((2, 3), jnp.int32)
    # Flax's LayerNorm takes its statistics in float32 by implicit promotion.
    with jax.numpy_dtype_promotion("standard"):
        logits = nnx.eval_shape(
            lambda: bert.MaskedLM(config, rngs=nnx.Rngs(0))(tokens, positions)
        )
    chex.assert_shape(logits, (2, 3, 11))
    chex.assert_type(logits, jnp.float32)


def test_logits_at_positions_are_those_of_all(model: bert.MaskedLM):
    tokens_BxL = jnp.arange(14).reshape(2, 7) % 11
    positions_BxK = jnp.array([[0, 6, 3], [5, 5, 1]])
    logits_BxKxV = nnx.jit(model)(tokens_BxL, positions_BxK)
    all_BxLxV = nnx.jit(model)(tokens_BxL)
    expected_BxKxV = all_BxLxV[jnp.arange(2)[:, None], positions_BxK]
    chex.assert_trees_all_close(logits_BxKxV, expected_BxKxV, atol=1e-6)


def test_every_position_sees_every_other_but_padding(model: bert.MaskedLM):
    tokens_1xL = jnp.arange(8)[None]
    mask_1xL = jnp.arange(8)[None] < 6
    encode = nnx.jit(lambda model, tokens: model.bert(tokens, mask_BxL=mask_1xL))
    hidden_1xLxD = encode(model, tokens_1xL)
    for index, seen in (0, True), (5, True), (6, False), (7, False):
        changed_1xLxD = encode(model, tokens_1xL.at[0, index].set(10))
        differs_L = np.asarray(hidden_1xLxD != changed_1xLxD).any(axis=(0, 2))
        assert (differs_L[:6] == seen).all()


def test_segments_differ(model: bert.MaskedLM):
    tokens_1xL = jnp.arange(8)[None]
    encode = nnx.jit(lambda model, segments: model.bert(tokens_1xL, segments))
    none = nnx.jit(lambda model: model.bert(tokens_1xL))(model)
    zeros = encode(model, jnp.zeros((1, 8), int))
    chex.assert_trees_all_close(zeros, none, atol=1e-6)
    assert not np.allclose(encode(model, jnp.ones((1, 8), int)), none)


def test_dropout_acts_with_rngs_alone():
    config = dataclasses.replace(CONFIG, hidden_dropout_prob=0.5)
    model = nnx.jit(lambda: bert.BERT(config, rngs=nnx.Rngs(0)))()
    tokens_1xL = jnp.arange(8)[None]
    encode = nnx.jit(lambda model, key: model(tokens_1xL, rngs=nnx.Rngs(dropout=key)))
    first, other = map(jax.random.key, (0, 1))
    assert not np.allclose(encode(model, first), encode(model, other))
    chex.assert_trees_all_equal(encode(model, first), encode(model, first))
    without = nnx.jit(lambda model: model(tokens_1xL))
    chex.assert_trees_all_equal(without(model), without(model))


def test_loss_and_accuracy_count_rows_of_weight_one(model: bert.MaskedLM):
    rng = np.random.default_rng(0)
    tokens = rng.integers(11, size=(3, 6), dtype=np.int32)
    positions = np.array([[0, 4], [1, 2], [3, 5]], np.int32)
    logits = np.asarray(nnx.jit(model)(tokens, positions), np.float64)
    targets = logits.argmax(-1).astype(np.int32)
    targets[2] = (targets[2] + [0, 1]) % 11  # Three of four are right, in rows 0 and 2.
    weight = np.array([1, 0, 1], np.float32)
    batch = {
        "tokens": tokens,
        "positions": positions,
        "targets": targets,
        "weight": weight,
    }
    means = nnx.jit(bert.masked_token_loss)(model, batch)
    log_probabilities = scipy.special.log_softmax(logits, axis=-1)
    expected = -np.take_along_axis(log_probabilities, targets[..., None], -1)[::2]
    assert means["loss"].total == pytest.approx(expected.sum(), rel=1e-6)
    assert means["accuracy"].total == 3
    assert means["loss"].count == means["accuracy"].count == 4

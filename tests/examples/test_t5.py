"""The T5 model: sizes, causality, position biases, loss. Parity tests do the rest."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from flax import nnx

from pretraining.models import t5

CONFIG = t5.T5Config(
    vocab_size=11,
    d_model=12,
    d_kv=5,
    d_ff=16,
    num_layers=2,
    num_decoder_layers=2,
    num_heads=3,
)


@pytest.fixture(scope="module")
def model() -> t5.T5:
    return nnx.jit(lambda: t5.T5(CONFIG, rngs=nnx.Rngs(0)))()


@pytest.mark.parametrize(
    ("size", "parameters"),
    [
        ("small", 76_961_152),
        ("base", 247_577_856),
        ("large", 783_150_080),
        ("small-v1.0", 60_506_624),
        ("base-v1.0", 222_903_552),
        ("large-v1.0", 737_668_096),
    ],
)
def test_sizes_are_the_published_ones(size: str, parameters: int):
    config = t5.SIZES[size]
    one, two = (count(config, layers) for layers in (1, 2))
    assert one + (config.num_layers - 1) * (two - one) == parameters


def count(config: t5.T5Config, layers: int) -> int:
    """Counts parameters without making any; each layer takes a while."""
    config = dataclasses.replace(config, num_layers=layers, num_decoder_layers=layers)
    model = nnx.eval_shape(lambda: t5.T5(config, rngs=nnx.Rngs(0)))
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("size", ["tiny", "tiny-v1.0"])
def test_logits_are_float32_for_every_target(size: str, dtype: jnp.dtype):
    config = dataclasses.replace(t5.SIZES[size], dtype=dtype)
    inputs, targets = jnp.zeros((2, 7), jnp.int32), jnp.zeros((2, 5), jnp.int32)
    # Flax's RMSNorm takes its statistics in float32 by implicit promotion.
    with jax.numpy_dtype_promotion("standard"):
        logits = nnx.eval_shape(
            lambda: t5.T5(config, rngs=nnx.Rngs(0))(inputs, targets)
        )
    chex.assert_shape(logits, (2, 5, config.vocab_size))
    chex.assert_type(logits, jnp.float32)


def test_a_target_sees_all_inputs_and_no_later_target(model: t5.T5):
    inputs_1xL, targets_1xM = jnp.arange(8)[None], jnp.arange(6)[None]
    logits_1xMxV = nnx.jit(model)(inputs_1xL, targets_1xM)
    changed_1xMxV = nnx.jit(model)(inputs_1xL, targets_1xM.at[0, 3].set(10))
    differs_M = np.asarray(logits_1xMxV != changed_1xMxV).any(axis=(0, 2))
    assert differs_M.tolist() == [False] * 3 + [True] * 3
    for index in 0, 7:
        changed_1xMxV = nnx.jit(model)(inputs_1xL.at[0, index].set(10), targets_1xM)
        assert np.asarray(logits_1xMxV != changed_1xMxV).any(axis=(0, 2)).all()


def test_buckets_are_exact_nearby_and_logarithmic_beyond():
    arguments = {"buckets": 32, "max_distance": 128}
    distance = np.arange(-200, 201)
    both = t5.relative_position_bucket(distance, bidirectional=True, **arguments)
    past = t5.relative_position_bucket(distance, bidirectional=False, **arguments)
    assert both[200 - 7 : 201].tolist() == [7, 6, 5, 4, 3, 2, 1, 0]
    assert both[201 : 201 + 7].tolist() == [17, 18, 19, 20, 21, 22, 23]
    assert past[200 - 15 : 201].tolist() == [*range(15, -1, -1)]
    assert (past[200:] == 0).all()
    assert both[0] == past[0] + both[0] - 31 == 15
    assert both[-1] == 31
    assert (np.diff(past) <= 0).all()


def test_decoder_inputs_are_targets_shifted_right(model: t5.T5):
    shifted = model.decoder_inputs(jnp.array([[5, 6, 7], [8, 9, 1]]))
    assert shifted.tolist() == [[0, 5, 6], [0, 8, 9]]


def test_loss_is_the_mean_over_rows_of_weight_one(model: t5.T5):
    rng = np.random.default_rng(0)
    inputs = rng.integers(11, size=(3, 6), dtype=np.int32)
    targets = rng.integers(11, size=(3, 4), dtype=np.int32)
    weight = np.array([1, 0, 1], np.float32)
    batch = {"inputs": inputs, "targets": targets, "weight": weight}
    mean = nnx.jit(t5.target_token_loss)(model, batch)["loss"]
    shifted = np.concatenate([np.zeros((3, 1), np.int32), targets[:, :-1]], axis=1)
    log_probabilities = scipy.special.log_softmax(
        np.asarray(nnx.jit(model)(inputs, shifted), np.float64), axis=-1
    )
    expected = -np.take_along_axis(log_probabilities, targets[..., None], -1)[::2]
    assert mean.count == 2 * 4
    assert mean.total == pytest.approx(expected.sum(), rel=1e-6)

"""The GPT-2 model: sizes, names, causality, loss."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from flax import nnx

from pretraining.models import gpt2

CONFIG = gpt2.GPT2Config(vocab_size=11, n_positions=8, n_embd=12, n_layer=2, n_head=3)


@pytest.fixture(scope="module")
def model() -> gpt2.GPT2:
    return nnx.jit(lambda: gpt2.GPT2(CONFIG, rngs=nnx.Rngs(0)))()


@pytest.mark.parametrize(
    ("size", "parameters"),
    [
        ("small", 124_439_808),
        ("medium", 354_823_168),
        ("large", 774_030_080),
        ("xl", 1_557_611_200),
    ],
)
def test_sizes_are_the_published_ones(size: str, parameters: int):
    model = nnx.eval_shape(lambda: gpt2.GPT2(gpt2.SIZES[size], rngs=nnx.Rngs(0)))
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert sum(leaf.size for leaf in leaves) == parameters


def test_names_are_hugging_face_s(model: gpt2.GPT2):
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    names = {".".join(map(str, path)) for path in flat.paths}
    layer = {
        f"{module}.{leaf}"
        for module, leaves in {
            "ln_1": ("scale", "bias"),
            "attn.c_attn": ("kernel", "bias"),
            "attn.c_proj": ("kernel", "bias"),
            "ln_2": ("scale", "bias"),
            "mlp.c_fc": ("kernel", "bias"),
            "mlp.c_proj": ("kernel", "bias"),
        }.items()
        for leaf in leaves
    }
    assert names == {
        "wte.embedding",
        "wpe.embedding",
        *(f"h.{index}.{name}" for index in range(2) for name in layer),
        "ln_f.scale",
        "ln_f.bias",
    }


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_logits_are_float32_for_every_position(dtype: jnp.dtype):
    config = dataclasses.replace(CONFIG, dtype=dtype)
    tokens = jnp.zeros((2, 5), jnp.int32)
    # Flax's LayerNorm takes its statistics in float32 by implicit promotion.
    with jax.numpy_dtype_promotion("standard"):
        logits = nnx.eval_shape(lambda: gpt2.GPT2(config, rngs=nnx.Rngs(0))(tokens))
    chex.assert_shape(logits, (2, 5, 11))
    chex.assert_type(logits, jnp.float32)


def test_a_position_sees_none_after_it(model: gpt2.GPT2):
    tokens_1xL = jnp.arange(8)[None]
    changed_1xL = tokens_1xL.at[0, 5].set(10)
    logits_1xLxV, changed_1xLxV = map(nnx.jit(model), (tokens_1xL, changed_1xL))
    differs_L = np.asarray(logits_1xLxV != changed_1xLxV).any(axis=(0, 2))
    assert differs_L.tolist() == [False] * 5 + [True] * 3


def test_loss_is_the_mean_over_rows_of_weight_one(model: gpt2.GPT2):
    tokens = np.random.default_rng(0).integers(11, size=(3, 6), dtype=np.int32)
    weight = np.array([1, 0, 1], np.float32)
    batch = {"tokens": tokens, "weight": weight}
    mean = nnx.jit(gpt2.next_token_loss)(model, batch)["loss"]
    log_probabilities = scipy.special.log_softmax(
        np.asarray(nnx.jit(model)(tokens[:, :-1]), np.float64), axis=-1
    )
    expected = -np.take_along_axis(log_probabilities, tokens[:, 1:, None], -1)[::2]
    assert mean.count == 2 * 5
    assert mean.total == pytest.approx(expected.sum(), rel=1e-6)

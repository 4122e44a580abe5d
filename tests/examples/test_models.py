"""The models: published sizes, names, who sees whom, dtypes."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import bert, classifier, gpt2, t5

GPT2 = gpt2.GPT2Config(vocab_size=11, n_positions=8, n_embd=12, n_layer=2, n_head=3)
BERT = bert.BERTConfig(11, 8, 2, 12, 20, 2, 3)
T5 = t5.T5Config(11, d_model=12, d_kv=5, d_ff=16, num_layers=2, num_decoder_layers=2)
T5 = dataclasses.replace(T5, num_heads=3)
INPUTS_1xL, TARGETS_1xM = jnp.arange(8)[None], jnp.arange(6)[None]


def make(build, config, **others):
    return nnx.jit(lambda: build(config, rngs=nnx.Rngs(0), **others))()


@nnx.jit
def call(model, *inputs):
    return model(*inputs)


@pytest.fixture(scope="module")
def masked_lm():
    return make(bert.MaskedLM, BERT)


@pytest.fixture(scope="module")
def text_to_text():
    return make(t5.T5, T5)


@pytest.mark.parametrize(
    ("build", "sizes", "size", "parameters"),
    [
        (gpt2.GPT2, gpt2.SIZES, "small", 124_439_808),
        (gpt2.GPT2, gpt2.SIZES, "medium", 354_823_168),
        (gpt2.GPT2, gpt2.SIZES, "large", 774_030_080),
        (gpt2.GPT2, gpt2.SIZES, "xl", 1_557_611_200),
        (bert.MaskedLM, bert.SIZES, "base", 109_514_298),
        (bert.MaskedLM, bert.SIZES, "large", 335_174_458),
        (bert.MaskedLM, bert.SIZES, "4b", 3_862_520_122),
        (t5.T5, t5.SIZES, "small", 76_961_152),
        (t5.T5, t5.SIZES, "base", 247_577_856),
        (t5.T5, t5.SIZES, "large", 783_150_080),
        (t5.T5, t5.SIZES, "small-v1.0", 60_506_624),
        (t5.T5, t5.SIZES, "base-v1.0", 222_903_552),
        (t5.T5, t5.SIZES, "large-v1.0", 737_668_096),
    ],
)
def test_sizes_are_the_published_ones(build, sizes, size, parameters):
    names = {"n_layer", "num_layers", "num_hidden_layers", "num_decoder_layers"}
    config = dataclasses.asdict(sizes[size])
    layers = sorted(names & config.keys())

    def count(n):
        few = dataclasses.replace(sizes[size], **dict.fromkeys(layers, n))
        model = nnx.eval_shape(lambda: build(few, rngs=nnx.Rngs(0)))
        return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))

    one = count(1)  # All would take a while.
    assert one + (config[layers[-1]] - 1) * (count(2) - one) == parameters


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("build", "config", "lengths"),
    [
        (gpt2.GPT2, GPT2, [5]),
        (bert.MaskedLM, BERT, [8, 5]),
        (t5.T5, t5.SIZES["tiny"], [7, 5]),
        (t5.T5, t5.SIZES["tiny-v1.0"], [7, 5]),
    ],
    ids=["gpt2", "bert", "t5", "t5-v1.0"],
)
def test_logits_are_float32_where_they_are_wanted(build, config, lengths, dtype):
    config = dataclasses.replace(config, dtype=dtype)
    inputs = [jnp.zeros((2, length), jnp.int32) for length in lengths]
    # Flax takes statistics in float32 by implicit promotion.
    with jax.numpy_dtype_promotion("standard"):
        logits = nnx.eval_shape(lambda: build(config, rngs=nnx.Rngs(0))(*inputs))
    chex.assert_shape(logits, (2, 5, config.vocab_size))
    chex.assert_type(logits, jnp.float32)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: dataclasses.replace(GPT2, n_head=5), "n_embd 12 is no multiple of"),
        (lambda: dataclasses.replace(BERT, num_attention_heads=5), "hidden_size 12"),
        (lambda: dataclasses.replace(T5, feed_forward_proj="silu"), "only 'relu' or"),
    ],
)
def test_what_no_model_has_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def differs(one, other):
    """Tells at which positions (B, L, V) differ."""
    return np.asarray(one != other).any(axis=(0, 2)).tolist()


def test_gpt2_names_are_hugging_face_s_and_no_position_sees_a_later_one():
    model = make(gpt2.GPT2, GPT2)
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    kernels = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    layer = {f"{name}.{leaf}" for name in kernels for leaf in ("kernel", "bias")}
    layer |= {"ln_1.scale", "ln_1.bias", "ln_2.scale", "ln_2.bias"}
    assert {".".join(map(str, path)) for path in flat.paths} == {
        *("wte.embedding", "wpe.embedding", "ln_f.scale", "ln_f.bias"),
        *(f"h.{index}.{name}" for index in range(2) for name in layer),
    }
    logits = call(model, INPUTS_1xL)
    changed = call(model, INPUTS_1xL.at[0, 5].set(10))
    assert differs(logits, changed) == [False] * 5 + [True] * 3


def test_sampling_keeps_the_prompt_and_follows_the_seed():
    model = make(gpt2.GPT2, GPT2)
    first, again, other = (
        gpt2.sample(model, [3, 1, 4], 8, seed=seed, temperature=2.0)
        for seed in (0, 0, 1)
    )
    assert first == again != other
    assert first[:3] == other[:3] == [3, 1, 4]
    assert len(first) == 8


def test_bert_predicts_at_positions_what_it_does_at_all(masked_lm):
    tokens_BxL = jnp.arange(14).reshape(2, 7) % 11
    positions_BxK = jnp.array([[0, 6, 3], [5, 5, 1]])
    logits_BxKxV = call(masked_lm, tokens_BxL, positions_BxK)
    all_BxLxV = call(masked_lm, tokens_BxL)
    expected_BxKxV = all_BxLxV[jnp.arange(2)[:, None], positions_BxK]
    chex.assert_trees_all_close(logits_BxKxV, expected_BxKxV, atol=1e-6)


def test_bert_sees_every_position_but_padding_and_tells_segments(masked_lm):
    mask_1xL = jnp.arange(8)[None] < 6
    encode = nnx.jit(lambda model, *inputs: model.bert(*inputs))
    zeros_1xL = jnp.zeros((1, 8), jnp.int32)
    hidden_1xLxD = encode(masked_lm, INPUTS_1xL, zeros_1xL, mask_1xL)
    for index, seen in (0, True), (5, True), (6, False), (7, False):
        tokens = INPUTS_1xL.at[0, index].set(10)
        changed_1xLxD = encode(masked_lm, tokens, zeros_1xL, mask_1xL)
        assert differs(hidden_1xLxD, changed_1xLxD)[:6] == [seen] * 6
    zeros, ones = (encode(masked_lm, INPUTS_1xL, zeros_1xL + k) for k in (0, 1))
    chex.assert_trees_all_close(zeros, encode(masked_lm, INPUTS_1xL), atol=1e-6)
    assert not np.allclose(ones, zeros)


def test_dropout_acts_with_rngs_alone():
    model = make(bert.BERT, dataclasses.replace(BERT, hidden_dropout_prob=0.5))
    encode = nnx.jit(lambda model, key: model(INPUTS_1xL, rngs=nnx.Rngs(dropout=key)))
    first, other = map(jax.random.key, (0, 1))
    assert not np.allclose(encode(model, first), encode(model, other))
    chex.assert_trees_all_equal(encode(model, first), encode(model, first))
    chex.assert_trees_all_equal(call(model, INPUTS_1xL), call(model, INPUTS_1xL))


def test_t5_targets_see_all_inputs_and_no_later_target(text_to_text):
    logits = call(text_to_text, INPUTS_1xL, TARGETS_1xM)
    changed = call(text_to_text, INPUTS_1xL, TARGETS_1xM.at[0, 3].set(10))
    assert differs(logits, changed) == [False] * 3 + [True] * 3
    for index in 0, 7:
        inputs = INPUTS_1xL.at[0, index].set(10)
        assert all(differs(logits, call(text_to_text, inputs, TARGETS_1xM)))
    shifted = text_to_text.decoder_inputs(jnp.array([[5, 6, 7], [8, 9, 1]]))
    assert shifted.tolist() == [[0, 5, 6], [0, 8, 9]]


@pytest.mark.parametrize("pooling", classifier.POOLINGS)
def test_classifier_pools_what_is_no_padding(pooling):
    config = dataclasses.replace(BERT, initializer_range=0.5)
    model = make(classifier.Classifier, config, classes=3, pooling=pooling)
    tokens = jnp.arange(16).reshape(2, 8) % 11
    mask = jnp.arange(8)[None] < jnp.array([[8], [5]])
    logits_BxC = call(model, tokens, mask)
    padded_BxC = call(model, tokens.at[1, 5:].set(10), mask)
    np.testing.assert_array_equal(logits_BxC, padded_BxC)
    hidden_BxLxD = nnx.jit(lambda m: m.bert(tokens, mask_BxL=mask))(model)
    hidden_LxD = np.asarray(hidden_BxLxD)[1, :5]
    pooled_D = hidden_LxD[0] if pooling == "cls" else hidden_LxD.mean(0)
    expected_C = pooled_D @ np.asarray(model.classifier.kernel[...])
    np.testing.assert_allclose(logits_BxC[1], expected_C, atol=1e-5)

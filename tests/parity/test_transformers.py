"""The models against Hugging Face's: logits, gradients and files, both ways.

Each is tiny and randomly initialised. Its parameters are scaled up so that softmaxes
and norms are far from uniform; else a wrong mask or bias could go unseen.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from flax import nnx

from formats import hugging_face
from models import bert, gpt2, t5

pytestmark = pytest.mark.parity

TOLERANCE = 1e-4
VOCAB = 37


class Case(NamedTuple):
    """A model of each library, and what it is called with."""

    theirs: type
    their_config: transformers.PretrainedConfig
    ours: type
    inputs: tuple[str, ...]


def t5_config(**others):
    return transformers.T5Config(
        vocab_size=VOCAB,
        d_model=24,
        d_kv=6,
        d_ff=32,
        num_layers=2,
        num_decoder_layers=3,
        num_heads=5,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=12,
        decoder_start_token_id=0,
        **others,
    )


CASES = {
    "gpt2": Case(
        transformers.GPT2LMHeadModel,
        transformers.GPT2Config(
            vocab_size=VOCAB, n_positions=32, n_embd=24, n_layer=2, n_head=3
        ),
        gpt2.GPT2,
        ("input_ids",),
    ),
    "bert": Case(
        transformers.BertForMaskedLM,
        transformers.BertConfig(
            vocab_size=VOCAB,
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=3,
            intermediate_size=40,
            max_position_embeddings=32,
        ),
        bert.MaskedLM,
        ("input_ids",),
    ),
    "t5-v1.0": Case(
        transformers.T5ForConditionalGeneration,
        t5_config(feed_forward_proj="relu", tie_word_embeddings=True),
        t5.T5,
        ("input_ids", "decoder_input_ids"),
    ),
    # A new v1.1 model is tied in transformers 5; the published ones are not.
    "t5-v1.1-tied": Case(
        transformers.T5ForConditionalGeneration,
        t5_config(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
        t5.T5,
        ("input_ids", "decoder_input_ids"),
    ),
    "t5-v1.1": Case(
        transformers.T5ForConditionalGeneration,
        t5_config(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
        t5.T5,
        ("input_ids", "decoder_input_ids"),
    ),
}
CONFIGS = {
    gpt2.GPT2: gpt2.GPT2Config,
    bert.MaskedLM: bert.BERTConfig,
    t5.T5: t5.T5Config,
}
LENGTHS = {"input_ids": 23, "decoder_input_ids": 17}


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request):
    return request.param


def their_model(case, folder):
    """Returns a random model, saved in the folder."""
    torch.manual_seed(0)
    model = case.theirs(case.their_config).eval()
    if case is CASES["t5-v1.1"]:
        model.lm_head.weight = torch.nn.Parameter(torch.randn(VOCAB, 24))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
        if case in (CASES["t5-v1.1"], CASES["t5-v1.1-tied"]):
            # v1.0 divides its logits by this; these would be five times as large.
            model.decoder.final_layer_norm.weight /= case.their_config.d_model**0.5
    model.save_pretrained(folder)
    return model


def load(case, folder):
    config = hugging_face.load_config(folder, CONFIGS[case.ours])
    model = nnx.eval_shape(lambda: case.ours(config, rngs=nnx.Rngs(0)))
    params = nnx.state(model, nnx.Param)
    nnx.update(model, hugging_face.load_params(folder, config, params))
    return model


def random_tokens(case):
    rng = np.random.default_rng(0)
    # Not 0: PyTorch leaves the padding token out of an embedding's gradient.
    return {
        name: rng.integers(1, VOCAB, size=(3, LENGTHS[name])) for name in case.inputs
    }


def their_logits(model, tokens):
    return model(**{name: torch.tensor(x) for name, x in tokens.items()}).logits


@nnx.jit
def our_logits(model, tokens):
    # Under jit the names are sorted.
    order = sorted(tokens, key=["input_ids", "decoder_input_ids"].index)
    return model(*(tokens[name].astype(jnp.int32) for name in order))


def test_logits_of_their_file(case, tmp_path):
    theirs = their_model(case, tmp_path)
    tokens = random_tokens(case)
    expected = their_logits(theirs, tokens).detach().numpy()
    logits = np.asarray(our_logits(load(case, tmp_path), tokens))
    assert expected.std() > 0.5
    np.testing.assert_allclose(logits, expected, rtol=0, atol=TOLERANCE)


def test_every_gradient(case, tmp_path):
    theirs = their_model(case, tmp_path)
    tokens = random_tokens(case)
    logits = their_logits(theirs, tokens)
    weights = np.random.default_rng(1).normal(size=logits.shape).astype(np.float32)
    (logits.log_softmax(-1) * torch.tensor(weights)).mean().backward()
    expected = {
        name: parameter.grad.numpy() for name, parameter in theirs.named_parameters()
    }

    def loss(model):
        return jnp.mean(jax.nn.log_softmax(our_logits(model, tokens)) * weights)

    model = load(case, tmp_path)
    # Saved like parameters, gradients get their names and layout.
    nnx.update(model, nnx.jit(nnx.grad(loss))(model))
    hugging_face.save(tmp_path, model)
    grads = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        scale = np.abs(expected[name]).max()
        # A key's bias moves all scores of a query alike: its gradient is rounding.
        assert scale > 1e-4 or name.endswith("key.bias"), name
        np.testing.assert_allclose(
            grad, expected[name], rtol=0, atol=TOLERANCE * max(scale, 1e-4)
        )


def test_they_load_our_file(case, tmp_path):
    their_model(case, tmp_path / "theirs")
    config = hugging_face.load_config(tmp_path / "theirs", CONFIGS[case.ours])
    model = case.ours(config, rngs=nnx.Rngs(0))
    hugging_face.save(tmp_path, model)
    theirs, report = case.theirs.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    tokens = random_tokens(case)
    np.testing.assert_allclose(
        np.asarray(our_logits(model, tokens)),
        their_logits(theirs.eval(), tokens).detach().numpy(),
        rtol=0,
        atol=TOLERANCE,
    )


@pytest.mark.parametrize("head", [True, False], ids=["masked LM", "encoder alone"])
def test_encoder_of_padded_pairs(head, tmp_path):
    case = CASES["bert"]
    theirs = their_model(case, tmp_path)
    if not head:
        theirs.bert.save_pretrained(tmp_path)
    config = hugging_face.load_config(tmp_path, bert.BERTConfig)
    encoder = nnx.eval_shape(lambda: bert.BERT(config, rngs=nnx.Rngs(0)))
    params = nnx.state(encoder, nnx.Param)
    nnx.update(encoder, hugging_face.load_params(tmp_path, config, params))

    tokens = random_tokens(case)["input_ids"]
    segments = np.where(np.arange(23) < [[5], [9], [23]], 0, 1)
    mask = np.arange(23) < [[23], [14], [20]]
    expected = theirs.bert(
        torch.tensor(tokens),
        token_type_ids=torch.tensor(segments),
        attention_mask=torch.tensor(mask),
    ).last_hidden_state
    hidden = nnx.jit(lambda model: model(tokens, segments, mask))(encoder)
    np.testing.assert_allclose(
        np.asarray(hidden)[mask],
        expected.detach().numpy()[mask],
        rtol=0,
        atol=TOLERANCE,
    )


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (8, 12), (16, 64)])
def test_relative_position_buckets(bidirectional, buckets, max_distance):
    from transformers.models.t5.modeling_t5 import T5Attention

    distance = np.arange(-2 * max_distance, 2 * max_distance)
    expected = T5Attention._relative_position_bucket(
        torch.tensor(distance), bidirectional, buckets, max_distance
    )
    ours = t5.relative_position_bucket(
        distance,
        bidirectional=bidirectional,
        buckets=buckets,
        max_distance=max_distance,
    )
    np.testing.assert_array_equal(ours, expected.numpy())


def test_bfloat16_in_several_files(tmp_path):
    case = CASES["bert"]
    theirs = their_model(case, tmp_path / "whole").to(torch.bfloat16)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len([*tmp_path.glob("model-*.safetensors")]) > 1
    model = load(case, tmp_path)
    expected = theirs.bert.embeddings.word_embeddings.weight.float().detach().numpy()
    embedding = model.bert.word_embeddings.embedding[...]
    assert embedding.dtype == jnp.float32
    np.testing.assert_array_equal(np.asarray(embedding), expected)

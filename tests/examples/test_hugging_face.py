"""Folders of Hugging Face: what is saved is loaded, what does not fit is refused."""

import dataclasses
import errno
import json
import math
import re
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from data import tokenization
from formats import hugging_face
from models import bert, gpt2, t5
from task import UserError

BERT = bert.BERTConfig(
    vocab_size=11,
    max_position_embeddings=8,
    hidden_size=12,
    intermediate_size=20,
    num_hidden_layers=1,
    num_attention_heads=3,
)
T5 = t5.T5Config(
    vocab_size=11,
    d_model=12,
    d_kv=5,
    d_ff=16,
    num_layers=1,
    num_decoder_layers=2,
    num_heads=3,
)
MODELS = {
    "gpt2": (
        gpt2.GPT2,
        gpt2.GPT2Config(vocab_size=11, n_positions=8, n_embd=12, n_layer=1, n_head=3),
    ),
    "bert": (bert.MaskedLM, BERT),
    "t5": (t5.T5, T5),
    "t5-v1.0": (t5.T5, t5.T5Config(**vars(T5) | t5.VERSION_1_0)),
}
CONFIGS = {
    gpt2.GPT2: gpt2.GPT2Config,
    bert.MaskedLM: bert.BERTConfig,
    t5.T5: t5.T5Config,
}
NO_SIZES = {"relative_attention_max_distance", "decoder_start_token_id"}


@pytest.fixture(params=MODELS)
def saved(request, tmp_path):
    """Saves a model in tmp_path and returns it."""
    build, config = MODELS[request.param]
    model = nnx.eval_shape(lambda: build(config, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32),
        nnx.state(model, nnx.Param),
    )
    nnx.update(model, params)
    hugging_face.save(tmp_path, model)
    return model


def load(folder, build):
    config = hugging_face.load_config(folder, CONFIGS[build])
    model = nnx.eval_shape(lambda: build(config, rngs=nnx.Rngs(0)))
    return hugging_face.load_params(folder, config, nnx.state(model, nnx.Param))


def test_what_is_saved_is_loaded(saved, tmp_path):
    assert hugging_face.load_config(tmp_path, type(saved.config)) == saved.config
    loaded = load(tmp_path, type(saved))
    chex.assert_trees_all_equal(loaded, nnx.state(saved, nnx.Param))


def change(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("value", [10**6, 10**30])
def test_huge_sizes_are_refused_soon(value, saved, tmp_path):
    before = (tmp_path / "config.json").read_text()
    for name, size in dataclasses.asdict(saved.config).items():
        if type(size) is int and name not in NO_SIZES:
            change(tmp_path, **{name: value})
            with pytest.raises(UserError, match=r"config\.json"):
                load(tmp_path, type(saved))
            (tmp_path / "config.json").write_text(before)


@pytest.mark.parametrize("saved", ["bert"], indirect=True)
class TestWhatDoesNotFit:
    """One line that names the file, what is there and what is wanted."""

    def refused(self, folder, message):
        with pytest.raises(UserError, match=message):
            load(folder, bert.MaskedLM)

    def test_config(self, saved, tmp_path):
        change(tmp_path, hidden_act="relu")
        self.refused(tmp_path, "hidden_act is 'relu'; only 'gelu'")
        with pytest.raises(UserError, match="model_type is 'bert'; only 'gpt2'"):
            hugging_face.load_config(tmp_path, gpt2.GPT2Config)
        for content, message in (
            ("{", "not JSON"),
            ("[" * 100_000, "not JSON"),
            ("[1, 2]", "must be an object"),
        ):
            (tmp_path / "config.json").write_text(content)
            self.refused(tmp_path, rf"config\.json: {message}")
        (tmp_path / "config.json").unlink()
        self.refused(tmp_path, r"config\.json: No such file")

    def test_parameters(self, saved, tmp_path):
        path, name = tmp_path / "model.safetensors", "cls.predictions.bias"
        tensors = safetensors.numpy.load_file(path)
        tensors[name] = np.full_like(tensors[name], np.nan)
        safetensors.numpy.save_file(tensors, path)
        self.refused(tmp_path, r"cls\.predictions\.bias has values that")
        del tensors[name]
        safetensors.numpy.save_file(tensors, path)
        self.refused(tmp_path, r"no cls\.predictions\.bias in")
        path.write_bytes(path.read_bytes()[:1000])
        self.refused(tmp_path, "not a safetensors file")
        path.unlink()
        self.refused(tmp_path, r"no model\.safetensors in it")

    def test_tokenizer(self, saved, tmp_path):
        vocabulary = {f"token {k}": k for k in range(12)}
        for arguments, message in (
            ((11,), "not a tokenizer"),
            ((11,), "has 12 tokens, more than the model's 11"),
            ((12, ["[PAD]"]), r"has no \[PAD\]"),
        ):
            with pytest.raises(UserError, match=rf"tokenizer\.json: {message}"):
                tokenization.load(tmp_path, *arguments)
            tokenizer = Tokenizer(WordLevel(vocabulary))
            tokenizer.save(str(tmp_path / "tokenizer.json"))
        assert tokenization.load(tmp_path, 12).get_vocab() == vocabulary

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            ({"num_attention_heads": None}, "num_attention_heads is None; must be int"),
            ({"num_attention_heads": 5}, "hidden_size 12 is no multiple of num_att"),
            ({"hidden_size": [12]}, r"hidden_size is \[12\]; must be int, 1 or more"),
            ({"vocab_size": 12}, r".*has shape \(11, 12\); .* \(12, 12\)"),
            ({"vocab_size": 0}, "vocab_size is 0; must be int, 1 or more"),
            ({"vocab_size": True}, "vocab_size is True; must be int"),
            ({"layer_norm_eps": "small"}, "layer_norm_eps is 'small'; must be float"),
            ({"layer_norm_eps": math.nan}, "layer_norm_eps is nan; must be float"),
            ({"layer_norm_eps": math.inf}, "layer_norm_eps is inf; must be float"),
            ({"is_decoder": True}, "is_decoder is True; only False is implemented"),
        ],
    )
    def test_values(self, saved, tmp_path, value, message):
        change(tmp_path, **value)
        file = "" if message.startswith(".*") else r"config\.json: "
        self.refused(tmp_path, file + message)

    def test_names_of_early_checkpoints(self, saved, tmp_path):
        path = tmp_path / "model.safetensors"
        early = {"weight": "gamma", "bias": "beta"}
        today = load(tmp_path, bert.MaskedLM)
        tensors = {
            re.sub(r"(?<=LayerNorm\.)\w+", lambda m: early[m[0]], name): tensor
            for name, tensor in safetensors.numpy.load_file(path).items()
        }
        assert any(name.endswith("gamma") for name in tensors)
        safetensors.numpy.save_file(tensors, path)
        chex.assert_trees_all_equal(
            *map(nnx.state, (load(tmp_path, bert.MaskedLM), today))
        )


@pytest.mark.parametrize("saved", ["t5-v1.0"], indirect=True)
class TestT5:
    def test_absent_fields_are_theirs(self, saved, tmp_path):
        path = tmp_path / "config.json"
        path.write_text('{"model_type": "t5", "num_layers": 3}')
        config = hugging_face.load_config(tmp_path, t5.T5Config)
        assert (config.num_layers, config.num_decoder_layers) == (3, 3)
        assert (config.d_ff, config.num_heads) == (2048, 8)
        assert config.feed_forward_proj == "relu"
        assert config.tie_word_embeddings and config.scale_decoder_outputs

    def test_unknown_activation(self, saved, tmp_path):
        change(tmp_path, feed_forward_proj="gated-silu")
        with pytest.raises(UserError, match="'gated-silu'; only 'relu' or 'gated"):
            hugging_face.load_config(tmp_path, t5.T5Config)

    def test_an_untied_head_must_be_there(self, saved, tmp_path):
        change(tmp_path, tie_word_embeddings=False)
        with pytest.raises(UserError, match=r"false in config\.json, but no lm_head"):
            hugging_face.load_config(tmp_path, t5.T5Config)


def test_a_full_disk_leaves_the_model_that_was_there(tmp_path, monkeypatch):
    build, config = MODELS["gpt2"]
    model = nnx.eval_shape(lambda: build(config, rngs=nnx.Rngs(0)))
    nnx.update(model, jax.tree.map(jnp.zeros_like, nnx.state(model, nnx.Param)))
    hugging_face.save(tmp_path, model)
    before = (tmp_path / "model.safetensors").read_bytes()

    def write_bytes(path, content):
        with path.open("wb") as file:
            file.write(content[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    with pytest.raises(OSError, match="No space left on device"):
        hugging_face.save(tmp_path, model)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2

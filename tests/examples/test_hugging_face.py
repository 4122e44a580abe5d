"""Folders of Hugging Face: what is saved is loaded, what does not fit is refused."""

import json
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from pretraining.errors import UserError
from pretraining.models import bert, gpt2, hugging_face, t5

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
T5_1_0 = {
    "feed_forward_proj": "relu",
    "tie_word_embeddings": True,
    "scale_decoder_outputs": True,
}
MODELS = {
    "gpt2": (
        gpt2.GPT2,
        gpt2.GPT2Config(vocab_size=11, n_positions=8, n_embd=12, n_layer=1, n_head=3),
    ),
    "bert": (bert.MaskedLM, BERT),
    "t5": (t5.T5, T5),
    "t5-v1.0": (t5.T5, t5.T5Config(**vars(T5) | T5_1_0)),
}


@pytest.fixture(params=MODELS)
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Any]:
    """Saves a model in tmp_path and returns it with its type there."""
    build, config = MODELS[request.param]
    model = nnx.eval_shape(lambda: build(config, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32),
        nnx.state(model, nnx.Param),
    )
    nnx.update(model, params)
    hugging_face.save(tmp_path, model)
    return request.param.partition("-")[0], model


def abstract_params(model_type: str, folder: Path, build: Any) -> nnx.State:
    config = hugging_face.load_config(folder, model_type)
    model = nnx.eval_shape(lambda: build(config, rngs=nnx.Rngs(0)))
    return nnx.state(model, nnx.Param)


def test_what_is_saved_is_loaded(saved: tuple[str, Any], tmp_path: Path):
    model_type, model = saved
    assert hugging_face.load_config(tmp_path, model_type) == model.config
    params = abstract_params(model_type, tmp_path, type(model))
    loaded = hugging_face.load_params(tmp_path, model_type, params)
    chex.assert_trees_all_equal(loaded, nnx.state(model, nnx.Param))


def change(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("saved", ["bert"], indirect=True)
class TestWhatDoesNotFit:
    """One line that names the file, what is there and what is wanted."""

    def load(self, folder: Path) -> None:
        params = abstract_params("bert", folder, bert.MaskedLM)
        hugging_face.load_params(folder, "bert", params)

    def test_config(self, saved: tuple[str, Any], tmp_path: Path):
        change(tmp_path, hidden_act="relu")
        with pytest.raises(UserError, match="hidden_act is 'relu'; only 'gelu'"):
            self.load(tmp_path)
        with pytest.raises(UserError, match="model_type is 'bert'; only 'gpt2'"):
            hugging_face.load_config(tmp_path, "gpt2")
        (tmp_path / "config.json").write_text("{")
        with pytest.raises(UserError, match=r"config\.json: not JSON"):
            self.load(tmp_path)
        (tmp_path / "config.json").unlink()
        with pytest.raises(UserError, match=r"config\.json: No such file"):
            self.load(tmp_path)

    def test_shapes(self, saved: tuple[str, Any], tmp_path: Path):
        change(tmp_path, vocab_size=12)
        with pytest.raises(UserError, match=r"has shape \(11, 12\); .* \(12, 12\)"):
            self.load(tmp_path)

    def test_parameters(self, saved: tuple[str, Any], tmp_path: Path):
        path = tmp_path / "model.safetensors"
        tensors = safetensors.numpy.load_file(path)
        del tensors["cls.predictions.bias"]
        safetensors.numpy.save_file(tensors, path)
        with pytest.raises(UserError, match=r"no cls\.predictions\.bias in"):
            self.load(tmp_path)
        path.write_bytes(path.read_bytes()[:1000])
        with pytest.raises(UserError, match="not a safetensors file"):
            self.load(tmp_path)
        path.unlink()
        with pytest.raises(UserError, match=r"no model\.safetensors in it"):
            self.load(tmp_path)

    def test_tokenizer(self, saved: tuple[str, Any], tmp_path: Path):
        with pytest.raises(UserError, match=r"tokenizer\.json: not a tokenizer"):
            hugging_face.load_tokenizer(tmp_path)

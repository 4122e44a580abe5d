"""Models in Hugging Face's folders: config.json and model.safetensors.

`transformers` loads what is saved here, and what it saved (or what was downloaded) is
loaded here. Names differ by the few rules in the table below; the values are the same.
"""

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx
from tokenizers import Tokenizer

from pretraining.errors import UserError
from pretraining.files import write_atomically
from pretraining.models import bert, gpt2, t5
from pretraining.training.devices import is_first_process


@dataclasses.dataclass(frozen=True)
class _Format:
    """How Hugging Face stores a model.

    Attributes:
        architecture: Its class there.
        config: Our configuration; fields have their names in config.json.
        fixed: What else stands in config.json, and values that the model implements.
        base: The prefix of the names that files of the bare model lack.
        names: Regular expressions from our names to theirs, applied in turn.
        transposed: Whether kernels are stored as (out, in).
    """

    architecture: str
    config: type
    fixed: Mapping[str, Any]
    base: str
    names: Mapping[str, str]
    transposed: bool = True


_FORMATS = {
    "gpt2": _Format(
        "GPT2LMHeadModel",
        gpt2.GPT2Config,
        {"activation_function": "gelu_new", "tie_word_embeddings": True},
        "transformer.",
        {"^": "transformer."},
        transposed=False,
    ),
    "bert": _Format(
        "BertForMaskedLM",
        bert.BERTConfig,
        {
            "hidden_act": "gelu",
            "position_embedding_type": "absolute",
            "tie_word_embeddings": True,
        },
        "bert.",
        {
            r"embeddings_norm": "embeddings.LayerNorm",
            r"(word|position|token_type)_embeddings": r"embeddings.\1_embeddings",
            r"(layer\.\d+)\.": r"encoder.\1.",
            r"attention\.(query|key|value)": r"attention.self.\1",
            r"attention_norm": "attention.output.LayerNorm",
            r"output_norm": "output.LayerNorm",
            r"(intermediate|output)\.(kernel|bias)": r"\1.dense.\2",
            r"^transform\.": "cls.predictions.transform.dense.",
            r"^transform_norm": "cls.predictions.transform.LayerNorm",
            r"^bias": "cls.predictions.bias",
        },
    ),
    "t5": _Format(
        "T5ForConditionalGeneration",
        t5.T5Config,
        {"is_encoder_decoder": True, "pad_token_id": 0, "eos_token_id": 1},
        "",
        {
            r"relative_attention_bias": r"block.0.attention.relative_attention_bias",
            r"cross_attention_norm": "layer.1.layer_norm",
            r"cross_attention": "layer.1.EncDecAttention",
            r"attention_norm": "layer.0.layer_norm",
            r"\.attention\.": ".layer.0.SelfAttention.",
            r"(encoder.*)mlp_norm": r"\1layer.1.layer_norm",
            r"(encoder.*)mlp": r"\1layer.1.DenseReluDense",
            r"(decoder.*)mlp_norm": r"\1layer.2.layer_norm",
            r"(decoder.*)mlp": r"\1layer.2.DenseReluDense",
            r"final_norm": "final_layer_norm",
        },
    ),
}
_LEAVES = {r"(kernel|embedding|scale)$": "weight"}


def save(folder: Path | str, model: nnx.Module) -> None:
    """Writes a model's config.json and model.safetensors, in the first process.

    Args:
        folder: Where; it must exist.
        model: A `GPT2`, `MaskedLM` or `T5`.
    """
    if not is_first_process():
        return
    folder = Path(folder)
    model_type = next(
        key for key, f in _FORMATS.items() if isinstance(model.config, f.config)
    )
    form = _FORMATS[model_type]
    config = dataclasses.asdict(model.config)
    del config["dtype"]
    content = {"model_type": model_type, "architectures": [form.architecture]}
    content |= config | dict(form.fixed)
    tensors = {}
    for path, value in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        array = np.asarray(value[...])
        if form.transposed and path[-1] == "kernel":
            array = array.T
        # A transposed view would be written in the order of its memory.
        tensors[_their_name(path, form)] = np.ascontiguousarray(array)
    safetensors.numpy.save_file(
        tensors, folder / "model.safetensors", metadata={"format": "pt"}
    )
    write_atomically(folder / "config.json", json.dumps(content, indent=2) + "\n")


def load_config(folder: Path | str, model_type: str) -> Any:
    """Returns the configuration in config.json.

    Args:
        folder: The folder that it is in.
        model_type: "gpt2", "bert" or "t5".

    Raises:
        UserError: There is none, or it is of a model that is not implemented here.
    """
    folder, form = Path(folder), _FORMATS[model_type]
    path = folder / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from error
    for name, wanted in {"model_type": model_type, **form.fixed}.items():
        if content.get(name, wanted) != wanted:
            raise UserError(
                f"{path}: {name} is {content[name]!r}; only {wanted!r} is implemented"
            )
    if model_type == "t5":
        # Releases of `transformers` differ in what tie_word_embeddings says of a T5:
        # 4 only scales outputs that are tied, 5 calls all tied. The file knows.
        tied = content.get("tie_word_embeddings", True)
        content.setdefault("scale_decoder_outputs", tied)
        content["tie_word_embeddings"] = "lm_head.weight" not in _read_names(folder)
    fields = {field.name for field in dataclasses.fields(form.config)} - {"dtype"}
    return form.config(**{k: v for k, v in content.items() if k in fields})


def load_params(folder: Path | str, model_type: str, params: nnx.State) -> nnx.State:
    """Returns parameters with the values in model.safetensors, in float32.

    Args:
        folder: The folder that it is in; of a model in several files, all are read.
        model_type: "gpt2", "bert" or "t5".
        params: The model's `nnx.Param` state, or its shapes. It may be a part, e.g. an
            encoder without its head.

    Raises:
        UserError: A file is missing or damaged, or lacks a parameter of that shape.
    """
    form, tensors, loaded = _FORMATS[model_type], {}, []
    for file in _open(Path(folder)):
        tensors |= {name: file.get_tensor(name) for name in file.keys()}
    for path, wanted in nnx.to_flat_state(params):
        name = _their_name(path, form)
        names = (name, form.base + name, name.removeprefix(form.base))
        found = next((tensors[n] for n in names if n in tensors), None)
        if found is None:
            raise UserError(f"{folder}: no {name} in its safetensors")
        if form.transposed and path[-1] == "kernel":
            found = found.T
        if found.shape != wanted.shape:
            raise UserError(
                f"{folder}: {name} has shape {found.shape}; config.json says "
                f"{wanted.shape}"
            )
        loaded.append((path, wanted.replace(found.astype(jnp.float32))))
    return nnx.from_flat_state(loaded)


def load_tokenizer(folder: Path | str) -> Tokenizer:
    """Returns the tokenizer in tokenizer.json.

    Raises:
        UserError: There is none.
    """
    path = Path(folder) / "tokenizer.json"
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # `tokenizers` raises nothing more specific.
        raise UserError(f"{path}: not a tokenizer: {error}") from error


def _read_names(folder: Path) -> set[str]:
    return {name for file in _open(folder) for name in file.keys()}


def _open(folder: Path) -> Iterator[Any]:
    paths = sorted(folder.glob("model*.safetensors"))
    if not paths:
        raise UserError(f"{folder}: no model.safetensors in it")
    for path in paths:
        try:
            # Tensors become JAX arrays: NumPy has no bfloat16.
            file = safetensors.safe_open(path, framework="flax")
        except (safetensors.SafetensorError, OSError) as error:
            raise UserError(f"{path}: not a safetensors file: {error}") from error
        with file:
            yield file


def _their_name(path: tuple[Any, ...], form: _Format) -> str:
    name = ".".join(map(str, path))
    for pattern, replacement in {**form.names, **_LEAVES}.items():
        name = re.sub(pattern, replacement, name)
    return name

"""Models in Hugging Face's folders: config.json and model.safetensors.

`transformers` loads what is saved here, and what it saved (or what was downloaded) is
loaded here. Names differ by the few rules in a model's `Format`; values are the same.
"""

import dataclasses
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx

from task import Config, UserError


@dataclasses.dataclass(frozen=True)
class Format:
    """How Hugging Face stores a model.

    Attributes:
        model_type: Its name there.
        architecture: Its class there.
        fixed: What else stands in config.json: values that the model implements.
        base: The prefix of the names that files of the bare model lack.
        names: Regular expressions from our names to theirs, applied in turn.
        transposed: Whether kernels are stored as (out, in).
        defaults: What an absent field means there, where ours is another.
    """

    model_type: str
    architecture: str
    fixed: Mapping[str, Any]
    base: str
    names: Mapping[str, str]
    transposed: bool = True
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)


# By the classes of our configurations, whose fields have their names in config.json.
FORMATS = {
    "GPT2Config": Format(
        "gpt2",
        "GPT2LMHeadModel",
        {
            "activation_function": "gelu_new",
            "tie_word_embeddings": True,
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
        },
        "transformer.",
        {"^": "transformer."},
        transposed=False,
    ),
    "BERTConfig": Format(
        "bert",
        "BertForMaskedLM",
        {
            "hidden_act": "gelu",
            "position_embedding_type": "absolute",
            "tie_word_embeddings": True,
            "is_decoder": False,
            "add_cross_attention": False,
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
        defaults={"hidden_dropout_prob": 0.1},
    ),
    "T5Config": Format(
        "t5",
        "T5ForConditionalGeneration",
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
        defaults={
            "d_ff": 2048,
            "num_layers": 6,
            "num_heads": 8,
            "feed_forward_proj": "relu",
            "tie_word_embeddings": True,
        },
    ),
}

# Early checkpoints of BERT, converted from TensorFlow, have the second ones.
_OLD_NAMES = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
_LEAVES = {r"(kernel|embedding|scale)$": "weight"}


def save(folder: Path | str, model: Any) -> None:
    """Writes a `GPT2`, `MaskedLM` or `T5` into a folder, in the first process."""
    if jax.process_index() > 0:
        return
    form = _format(model.config)
    config = dataclasses.asdict(model.config)
    del config["dtype"]
    content = {"model_type": form.model_type, "architectures": [form.architecture]}
    content |= config | dict(form.fixed)
    tensors = {}
    for path, value in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        array = np.asarray(value[...])
        if form.transposed and path[-1] == "kernel":
            array = array.T
        # A transposed view would be written in the order of its memory.
        tensors[_their_name(path, form)] = np.ascontiguousarray(array)
    encoded = safetensors.numpy.save(tensors, metadata={"format": "pt"})
    _replace(Path(folder, "model.safetensors"), encoded)
    _replace(Path(folder, "config.json"), json.dumps(content, indent=2).encode())


def load_config(folder: Path | str, config_class: type[Config]) -> Config:
    """Returns the configuration in config.json.

    Args:
        folder: The folder that it is in.
        config_class: `GPT2Config`, `BERTConfig` or `T5Config`.

    Raises:
        UserError: There is none, or it is of a model that is not implemented here.
    """
    folder, form = Path(folder), FORMATS[config_class.__name__]
    path = folder / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: must be an object, {{...}}")
    for name, wanted in {"model_type": form.model_type, **form.fixed}.items():
        if content.get(name, wanted) != wanted:
            raise UserError(
                f"{path}: {name} is {content[name]!r}; only {wanted!r} is implemented"
            )
    content = {**form.defaults, **content}
    if form.model_type == "t5":
        # Releases of `transformers` differ in what tie_word_embeddings says of a T5:
        # 4 only scales outputs that are tied, 5 calls all tied. The file knows.
        tied = content["tie_word_embeddings"]
        content.setdefault("scale_decoder_outputs", tied)
        content["tie_word_embeddings"] = "lm_head.weight" not in _read_names(folder)
        if content["tie_word_embeddings"] and tied is False:
            raise UserError(
                f"{folder}: tie_word_embeddings is false in config.json, but no "
                "lm_head.weight in its safetensors"
            )
        if content.get("num_decoder_layers") is None:
            content["num_decoder_layers"] = content.get("num_layers")
    config = _make_config(path, config_class, content)
    # Before a model of so many is built, which takes as long as they are many.
    arrays = len(_read_names(folder))
    for name, value in dataclasses.asdict(config).items():
        if name.endswith(("layers", "n_layer")) and value > arrays:
            raise UserError(
                f"{path}: {name} is {value}, but the safetensors there have {arrays} "
                "arrays"
            )
    return config


def _make_config(path: Path, config_class: Any, content: Mapping[str, Any]) -> Any:
    """Returns the configuration, or raises UserError at what cannot be one."""
    values = {}
    for field in dataclasses.fields(config_class):
        if field.name == "dtype":
            continue
        name, value = field.name, content.get(field.name, field.default)
        kind: Any = field.type
        least = 0 if kind is float or name.endswith("_id") else 1
        kinds = (int, float) if kind is float else (kind,)
        if type(value) not in kinds or (
            kind in (int, float) and not least <= value < math.inf
        ):
            raise UserError(
                f"{path}: {name} is {value!r}; must be {kind.__name__}"
                + (f", {least} or more" if kind in (int, float) else "")
            )
        values[name] = value
    try:
        return config_class(**values)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


def load_params(folder: Path | str, config: Any, params: nnx.State) -> nnx.State:
    """Returns parameters with the values in model.safetensors, in float32.

    Args:
        folder: The folder that it is in; of a model in several files, all are read.
        config: The model's.
        params: The model's `nnx.Param` state, or its shapes. It may be a part, e.g. an
            encoder without its head.

    Raises:
        UserError: A file is missing or damaged, or lacks a parameter of that shape.
    """
    form, loaded = _format(config), []
    tensors: dict[str, Any] = {}
    for file in _open(Path(folder)):
        tensors |= {name: file.get_tensor(name) for name in file.keys()}
    for path, wanted in nnx.to_flat_state(params):
        name = old = _their_name(path, form)
        for new, before in _OLD_NAMES.items():
            old = old.replace(new, before)
        names = [
            variant
            for spelled in (name, old)
            for variant in (
                *(spelled, form.base + spelled, spelled.removeprefix(form.base)),
            )
        ]
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
        found = found.astype(jnp.float32)
        if not jnp.isfinite(found).all():
            raise UserError(f"{folder}: {name} has values that are not finite")
        loaded.append((path, wanted.replace(found)))
    return nnx.from_flat_state(loaded)


def _replace(path: Path, content: bytes) -> None:
    """Replaces a file; whatever happens, the old or the new one is there."""
    temporary = path.with_name(f".{path.name}")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _format(config: Any) -> Format:
    return FORMATS[type(config).__name__]


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


def _their_name(path: tuple[Any, ...], form: Format) -> str:
    name = ".".join(map(str, path))
    for pattern, replacement in {**form.names, **_LEAVES}.items():
        name = re.sub(pattern, replacement, name)
    return name

"""Models in Hugging Face's folders: config.json and model.safetensors.

`transformers` loads what is saved here, and what it saved (or what was downloaded) is
loaded here. Names differ by the few rules in a model's `Format`; values are the same.
"""

import dataclasses
import importlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx
from tokenizers import Tokenizer

from pretraining.errors import UserError
from pretraining.files import replacing, write_atomically
from pretraining.training.devices import is_first_process


@dataclasses.dataclass(frozen=True)
class Format:
    """How Hugging Face stores a model; each model's module has one in HUGGING_FACE.

    Attributes:
        model_type: Its name there, and our module's.
        architecture: Its class there.
        config: Our configuration; fields have their names in config.json.
        fixed: What else stands in config.json, and values that the model implements.
        base: The prefix of the names that files of the bare model lack.
        names: Regular expressions from our names to theirs, applied in turn.
        transposed: Whether kernels are stored as (out, in).
        defaults: What an absent field means there, where ours is another.
        implied: Values that the model implements too, but that need not be written.
        choices: Values of fields that the model implements.
        heads: The fields of the width and of the number of heads that it is split to.
    """

    model_type: str
    architecture: str
    config: type
    fixed: Mapping[str, Any]
    base: str
    names: Mapping[str, str]
    transposed: bool = True
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    implied: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    choices: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)
    heads: tuple[str, str] | None = None


# Early checkpoints of BERT, converted from TensorFlow, have the second ones.
_OLD_NAMES = {
    "LayerNorm.weight": "LayerNorm.gamma",
    "LayerNorm.bias": "LayerNorm.beta",
}
_LEAVES = {r"(kernel|embedding|scale)$": "weight"}


def save(folder: Path | str, model: Any) -> None:
    """Writes a model's config.json and model.safetensors, in the first process.

    Args:
        folder: Where; it must exist.
        model: A `GPT2`, `MaskedLM` or `T5`.
    """
    if not is_first_process():
        return
    folder = Path(folder)
    # Configurations stand in the module that is named after the model's type.
    form = _format(type(model.config).__module__.rpartition(".")[2])
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
    target = folder / "model.safetensors"
    with replacing(target) as temporary:
        try:
            safetensors.numpy.save_file(tensors, temporary, metadata={"format": "pt"})
        except safetensors.SafetensorError as error:
            code = re.search(r"os error (\d+)", str(error))
            if code is None:
                raise
            raise OSError(
                int(code[1]), os.strerror(int(code[1])), str(target)
            ) from error
    write_atomically(folder / "config.json", json.dumps(content, indent=2) + "\n")


def load_config(folder: Path | str, model_type: str) -> Any:
    """Returns the configuration in config.json.

    Args:
        folder: The folder that it is in.
        model_type: "gpt2", "bert" or "t5".

    Raises:
        UserError: There is none, or it is of a model that is not implemented here.
    """
    folder, form = Path(folder), _format(model_type)
    path = folder / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: must be an object, {{...}}")
    for name, wanted in {
        "model_type": model_type,
        **form.fixed,
        **form.implied,
    }.items():
        if content.get(name, wanted) != wanted:
            raise UserError(
                f"{path}: {name} is {content[name]!r}; only {wanted!r} is implemented"
            )
    content = {**form.defaults, **content}
    if model_type == "t5":
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
    config = _make_config(path, form, content)
    # Before a model of so many is built, which takes as long as they are many.
    arrays = len(_read_names(folder))
    for name, value in dataclasses.asdict(config).items():
        if name.endswith(("layers", "n_layer")) and value > arrays:
            raise UserError(
                f"{path}: {name} is {value}, but the safetensors there have {arrays} "
                "arrays"
            )
    return config


def _make_config(path: Path, form: Format, content: Mapping[str, Any]) -> Any:
    """Returns the configuration, or raises UserError at what cannot be one."""
    values = {}
    for field in dataclasses.fields(form.config):
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
        if value not in form.choices.get(name, [value]):
            known = " or ".join(map(repr, form.choices[name]))
            raise UserError(f"{path}: {name} is {value!r}; only {known} is implemented")
        values[name] = value
    if form.heads is not None:
        width, heads = (values[name] for name in form.heads)
        if width % heads:
            raise UserError(
                f"{path}: {form.heads[0]} {width} is no multiple of {form.heads[1]} "
                f"{heads}"
            )
    return form.config(**values)


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
    form, loaded = _format(model_type), []
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


def load_tokenizer(
    folder: Path | str, vocab_size: int, special: Sequence[str] = ()
) -> Tokenizer:
    """Returns the tokenizer in tokenizer.json.

    Args:
        folder: The folder that it is in.
        vocab_size: The model's.
        special: Tokens that it must have.

    Raises:
        UserError: There is none, or it does not fit the model.
    """
    path = Path(folder) / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # `tokenizers` raises nothing more specific.
        raise UserError(f"{path}: not a tokenizer: {error}") from error
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest >= vocab_size:
        raise UserError(
            f"{path}: has {highest + 1} tokens, more than the model's {vocab_size}"
        )
    for token in special:
        if tokenizer.token_to_id(token) is None:
            raise UserError(f"{path}: has no {token}")
    return tokenizer


def _format(model_type: str) -> Format:
    module = importlib.import_module(f"pretraining.models.{model_type}")
    form: Format = module.HUGGING_FACE
    return form


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

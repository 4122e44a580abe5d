"""Shapes of models' parameters, well-known ones among them.

Kernels of the decoders that the examples don't have are (in, out) matrices.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from measuring.examples import bert, gpt2, t5


def gpt2_shapes(size: str = "small") -> Any:
    """Returns the shapes of a GPT-2's parameters, a leaf for each layer's."""
    config = gpt2.SIZES[size]
    return shapes_of(lambda rngs: gpt2.GPT2(config, rngs=rngs))


def bert_shapes(size: str = "base") -> Any:
    """Returns the shapes of a BERT's parameters, a leaf for each layer's."""
    config = bert.SIZES[size]
    return shapes_of(lambda rngs: bert.MaskedLM(config, rngs=rngs))


def shapes_of(make_model: Callable[[nnx.Rngs], nnx.Module]) -> Any:
    """Returns the shapes of a model's parameters."""
    model = nnx.eval_shape(lambda: make_model(nnx.Rngs(0)))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    return jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)


def _t5(heads: int, inner: int) -> Any:
    config = dataclasses.replace(
        t5.SIZES["large-v1.0"], d_kv=128, num_heads=heads, d_ff=inner
    )
    return shapes_of(lambda rngs: t5.T5(config, rngs=rngs))


def _decoder(
    width: int,
    layers: int,
    heads: int,
    kv_heads: int,
    head_size: int,
    inner: int,
    vocabulary: int,
    *,
    tied: bool = False,
    biased: bool = False,
    norm_heads: bool = False,
    norm_outputs: bool = False,
) -> Any:
    """Llama, and what Gemma and Qwen add to it."""
    attention: dict[str, Any] = {
        "query": {"kernel": (width, heads * head_size)},
        "key": {"kernel": (width, kv_heads * head_size)},
        "value": {"kernel": (width, kv_heads * head_size)},
        "output": {"kernel": (heads * head_size, width)},
    }
    if biased:
        for name in ("query", "key", "value"):
            attention[name]["bias"] = attention[name]["kernel"][1:]
    if norm_heads:
        attention |= {"query_norm": (head_size,), "key_norm": (head_size,)}
    layer = {
        "attention_norm": (width,),
        "attention": attention,
        "mlp_norm": (width,),
        "mlp": {"gate": (width, inner), "up": (width, inner), "down": (inner, width)},
    }
    if norm_outputs:
        layer |= {"attention_output_norm": (width,), "mlp_output_norm": (width,)}
    head = {} if tied else {"head": (width, vocabulary)}
    embedding = {"embedding": (vocabulary, width)}
    return {**embedding, "layers": [layer] * layers, "norm": (width,), **head}


_gemma3 = functools.partial(_decoder, tied=True, norm_heads=True, norm_outputs=True)

MODELS: dict[str, Callable[[], Any]] = {
    # Llama 3.2, 3.1, 2 and 3.1; Gemma 3 (without its eyes) and, of 7 B, the first;
    # Qwen 3 and, of 72 B, 2.5.
    "llama-1b": lambda: _decoder(2048, 16, 32, 8, 64, 8192, 128256, tied=True),
    "llama-8b": lambda: _decoder(4096, 32, 32, 8, 128, 14336, 128256),
    "llama-13b": lambda: _decoder(5120, 40, 40, 40, 128, 13824, 32000),
    "llama-70b": lambda: _decoder(8192, 80, 64, 8, 128, 28672, 128256),
    "gemma-1b": lambda: _gemma3(1152, 26, 4, 1, 256, 6912, 262144),
    "gemma-7b": lambda: _decoder(3072, 28, 16, 16, 256, 24576, 256000, tied=True),
    "gemma-12b": lambda: _gemma3(3840, 48, 16, 8, 256, 15360, 262208),
    "gemma-27b": lambda: _gemma3(5376, 62, 32, 16, 128, 21504, 262208),
    "qwen-2b": lambda: _decoder(
        2048, 28, 16, 8, 128, 6144, 151936, tied=True, norm_heads=True
    ),
    "qwen-8b": lambda: _decoder(4096, 36, 32, 8, 128, 12288, 151936, norm_heads=True),
    "qwen-14b": lambda: _decoder(5120, 40, 40, 8, 128, 17408, 151936, norm_heads=True),
    "qwen-72b": lambda: _decoder(8192, 80, 64, 8, 128, 29568, 152064, biased=True),
    "bert-base": lambda: bert_shapes("base"),
    "bert-large": lambda: bert_shapes("large"),
    "bert-4b": lambda: bert_shapes("4b"),
    "gpt2": lambda: gpt2_shapes("small"),
    "gpt2-medium": lambda: gpt2_shapes("medium"),
    "gpt2-large": lambda: gpt2_shapes("large"),
    "gpt2-xl": lambda: gpt2_shapes("xl"),
    "t5-3b": lambda: _t5(32, 16384),
    "t5-11b": lambda: _t5(128, 65536),
}


def abstract_params(model: str, dtype: str = "float32") -> Any:
    """Returns the shapes of a model's parameters, as ``jax.ShapeDtypeStruct``."""
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)),
        _shapes(model),
        is_leaf=lambda x: isinstance(x, tuple),
    )


@functools.cache
def _shapes(model: str) -> Any:
    return jax.tree.map(
        lambda p: getattr(p, "shape", p),
        MODELS[model](),
        is_leaf=lambda x: isinstance(x, tuple),
    )

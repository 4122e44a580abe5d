"""Prints what optimizers' states take for well-known models.

    python -m came_optax.memory                              # All of them, a table.
    python -m came_optax.memory --model llama-8b --optimizer came-int8

Nothing is allocated: a model here is the shapes of its parameters, kernels as
(in, out) matrices.
"""

import argparse
import collections
import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from came_optax._came import came
from came_optax._memory import state_memory

# Made when called, so that importing this leaves JAX unused.
OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "adamw": partial(optax.adamw, 1e-3),
    "adafactor": partial(optax.adafactor, 1e-3, momentum=0.9),
    "adafactor-no-momentum": partial(optax.adafactor, 1e-3),
    "came": partial(came, 1e-3),
    "came-bfloat16": partial(came, 1e-3, mu_dtype="bfloat16"),
    "came-int8": partial(came, 1e-3, mu_dtype="int8"),
    "came-int4": partial(came, 1e-3, mu_dtype="int4"),
}


def _dense(n_in: int, n_out: int) -> dict[str, Any]:
    return {"kernel": (n_in, n_out), "bias": (n_out,)}


def _norm(width: int) -> dict[str, Any]:
    return {"scale": (width,), "bias": (width,)}


def _bert(width: int, layers: int) -> Any:
    layer = {
        **{name: _dense(width, width) for name in ("query", "key", "value", "output")},
        "attention_norm": _norm(width),
        "up": _dense(width, 4 * width),
        "down": _dense(4 * width, width),
        "norm": _norm(width),
    }
    return {
        "embeddings": {
            "token": (30522, width),
            "position": (512, width),
            "segment": (2, width),
            "norm": _norm(width),
        },
        "layers": [layer] * layers,
        "head": {
            "dense": _dense(width, width),
            "norm": _norm(width),
            "bias": (30522,),
        },
    }


def _gpt2(width: int, layers: int) -> Any:
    layer = {
        "attention_norm": _norm(width),
        "query_key_value": _dense(width, 3 * width),
        "output": _dense(width, width),
        "norm": _norm(width),
        "up": _dense(width, 4 * width),
        "down": _dense(4 * width, width),
    }
    return {
        "embeddings": {"token": (50257, width), "position": (1024, width)},
        "layers": [layer] * layers,
        "norm": _norm(width),
    }


def _t5(width: int, layers: int, heads: int, inner: int) -> Any:
    attention = {
        "norm": (width,),
        **{name: (width, 128 * heads) for name in ("query", "key", "value")},
        "output": (128 * heads, width),
    }
    mlp = {"norm": (width,), "up": (width, inner), "down": (inner, width)}

    def stack(*attentions: str) -> Any:
        layer = {**dict.fromkeys(attentions, attention), "mlp": mlp}
        return {
            "relative_bias": (32, heads),
            "layers": [layer] * layers,
            "norm": (width,),
        }

    return {
        "embedding": (32128, width),
        "encoder": stack("attention"),
        "decoder": stack("attention", "cross_attention"),
    }


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


_gemma3 = partial(_decoder, tied=True, norm_heads=True, norm_outputs=True)

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
    "bert-base": lambda: _bert(768, 12),
    "bert-large": lambda: _bert(1024, 24),
    "bert-4b": lambda: _bert(2560, 48),
    "gpt2": lambda: _gpt2(768, 12),
    "gpt2-medium": lambda: _gpt2(1024, 24),
    "gpt2-large": lambda: _gpt2(1280, 36),
    "gpt2-xl": lambda: _gpt2(1600, 48),
    "t5-3b": lambda: _t5(1024, 24, 32, 16384),
    "t5-11b": lambda: _t5(1024, 24, 128, 65536),
}


def abstract_params(model: str, dtype: str = "float32") -> Any:
    """Returns the shapes of a model's parameters, as ``jax.ShapeDtypeStruct``."""
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)),
        MODELS[model](),
        is_leaf=lambda x: isinstance(x, tuple),
    )


_COLUMNS = {
    "AdamW, float32 parameters": ("adamw", "float32"),
    "AdamW, bfloat16 parameters": ("adamw", "bfloat16"),
    "Adafactor": ("adafactor-no-momentum", "bfloat16"),
    "Adafactor, momentum": ("adafactor", "bfloat16"),
    "CAME": ("came", "bfloat16"),
    "CAME, bfloat16": ("came-bfloat16", "bfloat16"),
    "CAME, int8": ("came-int8", "bfloat16"),
    "CAME, int4": ("came-int4", "bfloat16"),
}


def table(models: Iterable[str] = MODELS) -> str:
    """Returns a Markdown table of the states' bytes.

    CAME's are the same for parameters of both dtypes.
    """
    head = ["state (10⁹ bytes)", "parameters (10⁹)", *_COLUMNS]
    rows = [head, ["---"] + ["---:"] * (len(head) - 1)]
    for model in models:
        size = sum(math.prod(p.shape) for p in jax.tree.leaves(abstract_params(model)))
        rows.append([model, f"{size / 1e9:.3f}"])
        for optimizer, dtype in _COLUMNS.values():
            rows[-1].append(f"{state_bytes(model, optimizer, dtype) / 1e9:.3f}")
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def state_bytes(model: str, optimizer: str, dtype: str) -> int:
    """Returns the bytes of a state, tracing one leaf of each shape."""
    leaves = jax.tree.leaves(abstract_params(model, dtype))
    counts = collections.Counter(str(leaf.shape) for leaf in leaves)
    one_of_each = {str(leaf.shape): leaf for leaf in leaves}
    by_leaf = state_memory(OPTIMIZERS[optimizer](), one_of_each).by_leaf
    return sum(counts.get(name, 1) * size for name, size in by_leaf.items())


def main() -> None:
    """Reads the command line and prints a table."""
    parser = argparse.ArgumentParser(
        prog="python -m came_optax.memory", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--model", choices=MODELS, help="default: a table of all")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="came")
    parser.add_argument(
        "--param-dtype", choices=["float32", "bfloat16"], default="float32"
    )
    args = parser.parse_args()
    if args.model is None:
        print(table())
    else:
        params = abstract_params(args.model, args.param_dtype)
        print(state_memory(OPTIMIZERS[args.optimizer](), params))


if __name__ == "__main__":
    main()

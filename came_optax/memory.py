"""Prints what optimizers' states take for well-known models.

    python -m came_optax.memory --model bert-large --optimizer came-int8

Nothing is allocated: a model here is the shapes of its parameters, kernels as
(in, out) matrices.
"""

import argparse
from collections.abc import Callable
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


MODELS: dict[str, Callable[[], Any]] = {
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


def main() -> None:
    """Reads the command line and prints a table."""
    parser = argparse.ArgumentParser(
        prog="python -m came_optax.memory", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="came")
    parser.add_argument(
        "--param-dtype", choices=["float32", "bfloat16"], default="float32"
    )
    args = parser.parse_args()
    params = abstract_params(args.model, args.param_dtype)
    print(state_memory(OPTIMIZERS[args.optimizer](), params))


if __name__ == "__main__":
    main()

"""The optimizers and the parameters that updates are measured with."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from came_optax import _schedules as schedules
from came_optax import came
from pretraining.models import bert, gpt2

# Made when called: to compile for GPUs that aren't there, JAX has to be unused before.
OPTIMIZERS: dict[str, Any] = {
    "SGD": partial(optax.sgd, 1e-3),
    "AdamW": partial(optax.adamw, 1e-3, weight_decay=0.1),
    "Adafactor": partial(optax.adafactor, 1e-3),
    "Adafactor, momentum": partial(optax.adafactor, 1e-3, momentum=0.9),
    **{
        f"CAME, {dtype}": partial(came, 1e-3, weight_decay=0.1, mu_dtype=dtype)
        for dtype in ("float32", "bfloat16", "int8", "int4")
    },
}


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


def small_shapes(leaves: int = 1000) -> Any:
    """Returns the shapes of many small matrices and vectors in turn."""
    shapes = [(32, 32), (32,)]
    return [
        jax.ShapeDtypeStruct(shapes[i % len(shapes)], jnp.float32)
        for i in range(leaves)
    ]


def random_like(shapes: Any, dtype: Any = jnp.float32) -> Any:
    """Returns arrays of such shapes, normal and the same in each run."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda p: jnp.asarray(rng.standard_normal(p.shape, np.float32), dtype), shapes
    )


def number(params: Any) -> int:
    """Returns how many parameters there are."""
    return sum(p.size for p in jax.tree.leaves(params))


def make_update(tx: optax.GradientTransformation) -> Any:
    """Returns a jitted ``(params, state, grads) -> (params, state)`` that donates."""

    def update(params: Any, state: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(update, donate_argnums=(0, 1))


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """What is traced within computes CAME as it is written, on every platform."""
    with mock.patch.dict(schedules.BY_PLATFORM, clear=True):
        yield

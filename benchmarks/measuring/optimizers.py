"""The optimizers of the tables: what is recommended first, then all else."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import optax

from came_optax import _schedules as schedules
from came_optax import came, came_muon, steady_came

Make = Callable[..., optax.GradientTransformation]


def _numbers(params: Any) -> Any:
    """Returns which leaves Muon takes: those that came_muon does."""
    return jax.tree.map_with_path(
        lambda path, p: (
            optax.contrib.MuonDimensionNumbers()
            if p.ndim == 2 and "embedding" not in jax.tree_util.keystr(path)
            else None
        ),
        params,
    )


# Made when called: to compile for GPUs that aren't there, JAX has to be unused before.
_STEADY: Mapping[str, Make] = {
    f"steady_came, {dtype}": partial(
        steady_came, 1e-3, weight_decay=0.1, mu_dtype=dtype
    )
    for dtype in ("float32", "bfloat16", "int8", "int4")
}
_CAME_MUON: Mapping[str, Make] = {
    f"came_muon, {dtype}": partial(came_muon, 1e-3, weight_decay=0.1, mu_dtype=dtype)
    for dtype in ("float32", "int8")
}
# Without matrix products.
OURS: Mapping[str, Make] = {
    **_STEADY,
    "came, float32": partial(came, 1e-3, weight_decay=0.1),
}
OPTAX: Mapping[str, Make] = {
    "AdamW": partial(optax.adamw, 1e-3, weight_decay=0.1),
    "Adafactor, momentum": partial(optax.adafactor, 1e-3, momentum=0.9),
    "Adafactor": partial(optax.adafactor, 1e-3),
    "SGD": partial(optax.sgd, 1e-3),
}
_MUON: Mapping[str, Make] = {
    "Muon": partial(
        optax.contrib.muon,
        1e-3,
        weight_decay=0.1,
        muon_weight_dimension_numbers=_numbers,
    )
}
OPTIMIZERS: Mapping[str, Make] = {**_STEADY, **_CAME_MUON, **OURS, **OPTAX, **_MUON}
# Those whose matrix products take a hundred times as long as the others' updates.
ORTHOGONALIZING = (*_CAME_MUON, *_MUON)


def as_written(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Computes CAME as it is written, in the place of each platform's schedule."""

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        with mock.patch.dict(schedules.BY_PLATFORM, clear=True):  # While it is traced.
            return tx.update(updates, state, params)

    return optax.GradientTransformation(tx.init, update)


AS_WRITTEN: Mapping[str, Make] = {
    f"as written: {name}": lambda make=make: as_written(make())
    for name, make in OURS.items()
}


def in_float32(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Keeps the state in float32 whatever the parameters are, as CAME does.

    Optax's optimizers have moments in the parameters' dtype; in bfloat16 a second
    moment with a decay rate of 0.999 hardly moves.
    """

    def widen(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        new, state = tx.update(widen(updates), state, widen(params))
        return jax.tree.map(lambda u, p: u.astype(p.dtype), new, params), state

    return optax.GradientTransformation(lambda params: tx.init(widen(params)), update)

"""What CAME and the authors' PyTorch code, came-pytorch 0.1.3, do with 300 gradients.

Both are given the same ones; every array that they keep is compared after every step.
"""

import functools
from typing import NamedTuple

import came_pytorch
import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

import came_optax
from came_optax import _schedules as schedules

STEPS = 300
SHAPES = [
    (),
    (1,),
    (7,),
    (1, 1),
    (6, 1),
    (1, 5),
    (6, 5),
    (5, 5),
    (3, 4, 5),
    (2, 1, 4),
    (2, 3, 4, 5),
    (3, 3, 1, 6),
    (7, 1),
    (1, 9),
    (1, 1, 64, 32),
]
KINDS = ["normal", "heavy-tailed", "sparse", "biased", "changing scale"]


class Hyperparameters(NamedTuple):
    """What the two optimizers are given."""

    betas: tuple[float, float, float]
    eps: tuple[float, float]
    clip: float


PUBLISHED = Hyperparameters((0.9, 0.999, 0.9999), (1e-30, 1e-16), 1.0)
OTHER = Hyperparameters((0.5, 0.9, 0.97), (1e-3, 1e-2), 0.3)
RUNS = [(kind, scale, PUBLISHED) for kind in KINDS for scale in (1e-8, 1.0, 1e4)]
RUNS += [(kind, 1.0, OTHER) for kind in KINDS]

WEIGHT_DECAY = 0.1
# Linear warmup from 1e-3 to 1e-2, then a cosine to 0.
LEARNING_RATES = np.minimum(
    np.linspace(1e-3, 1e-2, 20).repeat([1] * 19 + [STEPS - 19]),
    5e-3 * (1 + np.cos(np.linspace(0, np.pi, STEPS))),
).astype(np.float32)

STATE_NAMES = {
    "v_row": "exp_avg_sq_row",
    "v_col": "exp_avg_sq_col",
    "v": "exp_avg_sq",
    "mu": "exp_avg",
    "s_row": "exp_avg_res_row",
    "s_col": "exp_avg_res_col",
}
# Relative to: the distance that the parameters moved, the size of the momentum, each
# element of the statistics.
TOLERANCES = dict.fromkeys(STATE_NAMES, 1e-5) | {"params": 1e-4}


def gradients(kind, scale, shape):
    """Returns STEPS gradients of a leaf, float32."""
    rng = np.random.default_rng([KINDS.index(kind), *shape])
    size = (STEPS, *shape)
    g = rng.normal(size=size)
    if kind == "heavy-tailed":
        g = rng.standard_t(df=2, size=size)
    elif kind == "sparse":
        g *= active(rng, (*shape[:-1], 1) if shape else ())
        if len(shape) > 1:
            g *= active(rng, (*shape[:-2], 1, shape[-1]))
    elif kind == "biased":
        g += 3 * rng.normal(size=shape)
    elif kind == "changing scale":
        exponents = rng.uniform(-4, 4, size=STEPS)
        g *= 10 ** exponents.reshape(STEPS, *(1 for _ in shape))
    return (scale * g).astype(np.float32)


def active(rng, shape):
    """Returns 1 for the rows (or columns) with a gradient, 0 for the others.

    They change every 20 steps; some have none until step 200, a few none ever.
    """
    n = STEPS // 20
    first = rng.choice([0, 0, 0, n * 2 // 3, n], size=shape)
    on = rng.random((n, *shape)) < 0.6
    on &= np.arange(n).reshape(n, *(1 for _ in shape)) >= first
    return np.repeat(on, 20, axis=0)


def initial_parameter(shape):
    return np.random.default_rng(shape).normal(size=shape).astype(np.float32)


@functools.cache
def training(came, hyperparameters):
    """Returns a compiled function from parameters and gradients to the history."""

    def learning_rate(count):
        return jnp.asarray(LEARNING_RATES)[count]

    betas, eps, clip = hyperparameters
    tx = came(
        learning_rate,
        **dict(zip(("b1", "b2", "b3"), betas, strict=True)),
        **dict(zip(("eps1", "eps2"), eps, strict=True)),
        clipping_threshold=clip,
        weight_decay=WEIGHT_DECAY,
    )

    def step(carry, grads):
        params, state = carry
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        arrays = {name: optax.tree.get(state, name) for name in STATE_NAMES}
        return (params, state), {"params": params, **arrays}

    def train(params, grads):
        return jax.lax.scan(step, (params, tx.init(params)), grads)[1]

    return jax.jit(train)


def run_optax(came, grads, hyperparameters):
    """Returns each leaf's parameter and state after every step."""
    params = {leaf: initial_parameter(g.shape[1:]) for leaf, g in grads.items()}
    arrays = training(came, hyperparameters)(*jax.device_put((params, grads)))
    return {
        leaf: {name: np.asarray(array[leaf]) for name, array in arrays.items()}
        for leaf in grads
    }


def run_torch(grads, hyperparameters):
    """The same, by the authors' code."""
    params = {
        leaf: torch.nn.Parameter(torch.tensor(initial_parameter(g.shape[1:])))
        for leaf, g in grads.items()
    }
    optimizer = came_pytorch.CAME(
        params.values(),
        lr=1.0,
        eps=hyperparameters.eps,
        clip_threshold=hyperparameters.clip,
        # The library's betas are float32. came-pytorch takes 1 - beta in float64, where
        # 1 - float32(0.9999) differs from 1e-4 by 1.7e-4: give it the float32 numbers.
        betas=tuple(np.float32(hyperparameters.betas).tolist()),
        weight_decay=WEIGHT_DECAY,
    )
    history = {leaf: {} for leaf in grads}
    for t, learning_rate in enumerate(LEARNING_RATES.tolist()):
        optimizer.param_groups[0]["lr"] = learning_rate
        for leaf, p in params.items():
            p.grad = torch.tensor(grads[leaf][t])
        optimizer.step()
        for leaf, p in params.items():
            state = optimizer.state[p]
            arrays = {ours: state.get(theirs) for ours, theirs in STATE_NAMES.items()}
            for name, array in ({"params": p.detach()} | arrays).items():
                if array is not None:
                    history[leaf].setdefault(name, []).append(array.numpy().copy())
    return {
        leaf: {name: np.stack(steps) for name, steps in arrays.items()}
        for leaf, arrays in history.items()
    }


@functools.cache
def trajectories(kind, scale, hyperparameters):
    """Returns our history and theirs, of all leaves in one run."""
    grads = {str(shape): gradients(kind, scale, shape) for shape in SHAPES}
    return (
        run_optax(came_optax.came, grads, hyperparameters),
        run_torch(grads, hyperparameters),
    )


def errors(ours, theirs):
    """Returns the error of each array of one leaf after every step; NaN is an error."""
    result = {}
    for name, expected in theirs.items():
        assert np.isfinite(expected).all(), f"{name} of came-pytorch is not finite"
        if ours[name].shape != expected.shape or ours[name].dtype != expected.dtype:
            result[name] = np.full(STEPS, np.inf)
            continue
        a, b = (x.reshape(STEPS, -1).astype(np.float64) for x in (ours[name], expected))
        difference = np.abs(a - b)
        if name == "params":
            # Each step rounds parameters of order 1 to 1e-7 of themselves. On the first
            # steps that is more than the tolerance times a distance of 1e-3, so that
            # 4 units in the last place are always allowed: 1e-6 at most.
            floor = 4 * np.spacing(np.abs(expected).max()).astype(np.float64)
            difference = np.maximum(difference - floor, 0)
            unit = largest_so_far(b - initial_parameter(expected.shape[1:]).ravel())
        elif name == "mu":
            unit = largest_so_far(b)
        else:
            unit = b
        with np.errstate(divide="ignore"):
            # Equal is no error, even where nothing has moved yet.
            error = np.divide(difference, unit, np.zeros_like(a), where=difference != 0)
        result[name] = error.max(axis=1)
    return result


def largest_so_far(x):
    return np.maximum.accumulate(np.abs(x).max(axis=1, keepdims=True))


def disagreements(ours, theirs):
    """Returns what to say of each array that is not as came-pytorch has it."""
    result = {}
    for name, error in errors(ours, theirs).items():
        wrong = ~(error <= TOLERANCES[name])
        if wrong.any():
            first = int(np.argmax(wrong))
            result[name] = (
                f"error {error[first]:.1e} after step {first + 1}, {error.max():.1e} "
                f"at most; allowed are {TOLERANCES[name]:.0e}"
            )
    return result


def use_schedule(monkeypatch, schedule):
    """Makes every platform compute by one schedule, and nothing by what was traced."""
    monkeypatch.setattr(schedules, "BY_PLATFORM", {"cpu": schedule})
    training.cache_clear()
    jax.clear_caches()

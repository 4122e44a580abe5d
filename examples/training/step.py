"""The first state, the training step and evaluation: pure, jitted, on a mesh."""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from came_optax import state_sharding
from task import Batch, Count, Mean, Task
from training import sharding

Params = Any


@dataclasses.dataclass(frozen=True)
class StepOptions:
    """Options for the training step.

    Attributes:
        seq_len: Tokens per sequence; by default the model's most.
        accumulate: Parts that a batch is computed in, to save memory.
        param_dtype: That parameters are stored in; in bfloat16 the optimizer's state
            has a byte more of each.
    """

    seq_len: Count | None = None
    accumulate: Count = 1
    param_dtype: Literal["float32", "bfloat16"] = "float32"


class TrainState(NamedTuple):
    """All that training changes.

    Attributes:
        step: Updates made so far, () int32, or its sharding.
        params: The model's `nnx.Param` state.
        opt_state: The optimizer's.
    """

    step: Any
    params: Params
    opt_state: optax.OptState


class Init(Protocol):
    """A jitted function from a seed to the first state, created where it will live."""

    def __call__(self, seed: int) -> TrainState:
        """Returns the state."""

    def eval_shape(self, seed: int) -> TrainState:
        """Returns its shapes, dtypes and shardings."""


def state_shardings(
    task: Task, tx: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """Returns the shardings of a training state, each in its place."""
    of_params = params_sharding(task, mesh)
    of_opt_state = state_sharding(
        tx, nnx.state(_abstract_model(task), nnx.Param), of_params
    )
    return TrainState(sharding.replicated(mesh), of_params, of_opt_state)


def params_sharding(task: Task, mesh: Mesh) -> Params:
    """Returns the shardings of the model's parameters."""
    model = _abstract_model(task)
    params, axes = nnx.state(model, nnx.Param), getattr(model, "tensor_axes", {})
    return sharding.param_shardings(mesh, params, axes)


def make_init(task: Task, tx: optax.GradientTransformation, mesh: Mesh) -> Init:
    """Returns a function that creates the first state where it will live."""

    def init(seed: int) -> TrainState:
        rngs = nnx.Rngs(jax.random.key(seed))
        params = nnx.state(task.make_model(rngs), nnx.Param)
        return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))

    return jax.jit(init, out_shardings=state_shardings(task, tx, mesh))


def first_state(task: Task, init: Init, seed: int) -> TrainState:
    """Returns what `make_init` made, with pretrained parameters where there are any."""
    state = init(seed)
    if task.pretrained is None:
        return state
    params = jax.tree.map(
        lambda new, p: jax.device_put(new.astype(p.dtype), p.sharding),
        task.pretrained(state.params),
        state.params,
    )
    return state._replace(params=params)


def state_shapes(
    task: Task, tx: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """Returns shapes, dtypes and shardings of a training state."""
    return make_init(task, tx, mesh).eval_shape(0)


def make_train_step(
    task: Task,
    tx: optax.GradientTransformation,
    accumulate: int,
    seed: int,
    mesh: Mesh,
) -> jax.stages.Wrapped:
    """Returns `(state, batch) -> (state, metrics)`; the state passed in is donated."""
    shardings = state_shardings(task, tx, mesh)
    gather = sharding.make_gather(shardings.params)

    def loss(params: Params, batch: Batch, key: jax.Array) -> tuple[jax.Array, Any]:
        params = gather(params)
        means = task.loss_fn(merge(task, params), batch, nnx.Rngs(dropout=key))
        return means["loss"].total, means

    def train_step(state: TrainState, batch: Batch):
        key = jax.random.fold_in(jax.random.key(seed), state.step)

        def add_part(sums: Any, part: tuple[jax.Array, Batch]) -> tuple[Any, None]:
            index, batch = part
            gradient = jax.grad(loss, has_aux=True)
            terms = gradient(state.params, batch, jax.random.fold_in(key, index))
            grads, means = jax.tree.map(lambda a, b: a + b.astype(a.dtype), sums, terms)
            grads = jax.lax.with_sharding_constraint(grads, shardings.params)
            return (grads, means), None

        # Neighbouring rows go to different parts: each part stays spread over sharding.
        parts = jax.tree.map(
            lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch
        )
        shapes = jax.eval_shape(jax.grad(loss, has_aux=True), state.params, batch, key)
        # In bfloat16 a sum of 64 parts would be off by 0.8 %.
        zeros = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype if accumulate == 1 else jnp.float32),
            shapes,
        )
        (grads, means), _ = jax.lax.scan(
            add_part, zeros, (jnp.arange(accumulate), parts)
        )
        count = means["loss"].count
        grads = jax.tree.map(
            lambda g, p: (g / count).astype(p.dtype), grads, state.params
        )
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        metrics = {name: mean.total / mean.count for name, mean in means.items()}
        metrics["gradient_norm"] = optax.tree.norm(grads)
        return TrainState(state.step + 1, params, opt_state), metrics

    return jax.jit(
        train_step,
        donate_argnums=0,
        out_shardings=(shardings, sharding.replicated(mesh)),
    )


def make_evaluate(
    task: Task, mesh: Mesh
) -> Callable[[Params, Iterable[Batch]], dict[str, float]]:
    """Returns `(params, batches) -> means over all batches`, without dropout."""

    def eval_step(params: Params, batch: Batch) -> dict[str, Mean]:
        return task.loss_fn(merge(task, params), batch, None)

    eval_step = jax.jit(eval_step, out_shardings=sharding.replicated(mesh))

    def evaluate(params: Params, batches: Iterable[Batch]) -> dict[str, float]:
        sums: dict[str, np.ndarray] = collections.defaultdict(lambda: np.zeros(2))
        for batch in batches:
            means = eval_step(params, sharding.put_batch(batch, mesh))
            for name, mean in means.items():
                sums[name] += np.asarray(mean, np.float64)
        return {name: float(total / count) for name, (total, count) in sums.items()}

    return evaluate


def merge(task: Task, params: Params) -> Any:
    """Returns the task's model with these parameters."""
    return nnx.merge(_graphdef(task), params)


@functools.cache
def _graphdef(task: Task) -> Any:
    graphdef, _ = nnx.split(_abstract_model(task), nnx.Param)
    return graphdef


def _abstract_model(task: Task) -> Any:
    return nnx.eval_shape(lambda: task.make_model(nnx.Rngs(0)))

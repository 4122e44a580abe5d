"""What the rooms share: a task and its records, a user's numbers and errors."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jsonargparse.typing import restricted_number_type

Batch = Mapping[str, jax.Array]
Record = Mapping[str, np.ndarray]
Config = TypeVar("Config")

# Types of options.
if TYPE_CHECKING:
    Count = int
    Whole = int
    Positive = float
    NonNegative = float
    Rate = float
else:
    _LIMIT, _INFINITY = ("<", 2**31), ("<", float("inf"))  # JAX counts in int32.
    Count = restricted_number_type("Count", int, [(">", 0), _LIMIT])
    Whole = restricted_number_type("Whole", int, [(">=", 0), _LIMIT])
    Positive = restricted_number_type("Positive", float, [(">", 0), _INFINITY])
    NonNegative = restricted_number_type("NonNegative", float, [(">=", 0), _INFINITY])
    Rate = restricted_number_type("Rate", float, [(">=", 0), ("<", 1)])


class UserError(Exception):
    """A wrong argument, file or folder; says which, what was given, what is allowed.

    The user reads it as one line, without a traceback.
    """


class Records(Protocol):
    """Records of named arrays, with random access.

    Attributes:
        arrays: All that they hold, to tell them from others.
    """

    @property
    def arrays(self) -> Sequence[np.ndarray]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Record: ...


class Mean(NamedTuple):
    """A mean kept as sum and count, so that means of batches add up exactly."""

    total: jax.Array
    count: jax.Array  # type: ignore[assignment]


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """A model, its loss and its data.

    Attributes:
        name: Names the run folder.
        make_model: Builds the model from its random streams; traced, so pure.
        loss_fn: `(model, batch, rngs)` to named means; "loss" is minimised, the others
            are reported. `batch` is a batch of records plus "weight" (B,), 0 on rows
            that only pad the last batch. `rngs` is None in evaluation: no dropout.
        train: What is learnt from, e.g. `pipeline.Windows`.
        validation: What is held out.
        tokens_per_record: Tokens that one record trains on, for the statistics.
        transform: Applied to each record with its own random generator, e.g. masking.
        pretrained: From the first parameters to those that training begins with.
        references: Named losses that the model should beat, shown beside the curve.
        options: What the model and the data were made from; saved with checkpoints.
        files: Texts to write into the run's folder, by name, e.g. the tokenizer.
    """

    name: str
    make_model: Callable[[nnx.Rngs], nnx.Module]
    loss_fn: Callable[[Any, Batch, nnx.Rngs | None], dict[str, Mean]]
    train: Records
    validation: Records
    tokens_per_record: int
    transform: Callable[[Record, np.random.Generator], Record] | None = None
    pretrained: Callable[[Any], Any] | None = None
    references: Mapping[str, float] = dataclasses.field(default_factory=dict)
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)


def with_param_dtype(task: Task, dtype: str) -> Task:
    """Returns the task with its model's parameters stored in this dtype."""

    def make_model(rngs: nnx.Rngs) -> nnx.Module:
        model = task.make_model(rngs)
        params = nnx.state(model, nnx.Param)
        nnx.update(model, jax.tree.map(lambda p: p.astype(dtype), params))
        return model

    return dataclasses.replace(task, make_model=make_model)


def of_size(sizes: Mapping[str, Config], size: str) -> Config:
    """Returns a model's configuration by the name of its size."""
    if size not in sizes:
        raise UserError(f"--size {size}: must be one of {', '.join(sizes)}")
    return sizes[size]


def compute_dtype() -> DTypeLike:
    """bfloat16 on accelerators; CPUs would emulate it, slowly."""
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16

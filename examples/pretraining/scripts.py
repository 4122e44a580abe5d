"""The pretraining scripts, each loaded when its model is asked for."""

import dataclasses
import importlib
from types import ModuleType
from typing import Any

from pretraining.errors import UserError

NAMES = ("gpt2", "bert", "t5")


def load(name: str, size: str) -> tuple[ModuleType, Any]:
    """Returns a script, such as `pretrain_gpt2`, and its options for a size of model.

    Raises:
        UserError: The model has no such size.
    """
    script = importlib.import_module(f"pretrain_{name}")
    (field,) = [f for f in dataclasses.fields(script.ModelOptions) if f.name == "size"]
    sizes = field.metadata["choices"]
    if size not in sizes:
        raise UserError(f"--size {size}: {name} has {', '.join(sizes)}")
    return script, script.ModelOptions(size=size)

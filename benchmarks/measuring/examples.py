"""All that the benchmarks take from the examples, and the one place that knows where.

The examples' modules call one another by their names in that folder, as what a script
there imports does.
"""

import sys

from measuring import ROOT

sys.path.append(str(ROOT / "examples"))

import pretrain_gpt2
from compile_for import make_task
from compiling import ahead_of_time, topologies
from compiling.topologies import GIB, Target
from compiling.traffic import traffic
from pretraining.data.pipeline import blank
from pretraining.errors import UserError
from pretraining.models import bert, gpt2, t5
from pretraining.table import format_table
from pretraining.task import Task, with_param_dtype
from pretraining.training import devices
from pretraining.training.sharding import make_gather, param_shardings
from pretraining.training.step import (
    TrainState,
    make_init,
    make_train_step,
    state_shapes,
)

__all__ = [
    "GIB",
    "Target",
    "Task",
    "TrainState",
    "UserError",
    "ahead_of_time",
    "bert",
    "blank",
    "devices",
    "format_table",
    "gpt2",
    "make_gather",
    "make_gpt2_task",
    "make_init",
    "make_task",
    "make_train_step",
    "param_shardings",
    "state_shapes",
    "t5",
    "topologies",
    "traffic",
    "with_param_dtype",
]


def make_gpt2_task(size: str, dtype: str) -> Task:
    """Returns a GPT-2's task, computed in ``dtype`` and without text."""
    model = pretrain_gpt2.ModelOptions(size=size)
    task, _ = pretrain_gpt2.without_text(model, dtype=dtype)
    return task

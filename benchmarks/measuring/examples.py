"""All that the benchmarks take from the examples, and the one place that knows where.

The examples' modules call one another by their names in that folder, as what a script
there imports does.
"""

import sys

from measuring import ROOT

sys.path.append(str(ROOT / "examples"))

from comparing.log import replacing
from compile_for import make_task
from compiling import ahead_of_time, hlo, topologies
from compiling.collectives import collectives
from compiling.topologies import GIB, Target
from compiling.traffic import traffic
from data.pipeline import blank
from models import bert, gpt2, t5
from table import format_table, of_columns
from task import Task, UserError, with_param_dtype
from tasks.gpt2 import ModelOptions, next_token_loss
from tasks.gpt2 import make_task as make_text_task
from training import sharding as devices
from training.sharding import make_gather, param_shardings
from training.step import TrainState, make_init, make_train_step

__all__ = [
    "GIB",
    "Target",
    "Task",
    "TrainState",
    "UserError",
    "ahead_of_time",
    "bert",
    "blank",
    "collectives",
    "devices",
    "format_table",
    "gpt2",
    "hlo",
    "make_gather",
    "make_gpt2_task",
    "make_init",
    "make_task",
    "make_train_step",
    "next_token_loss",
    "of_columns",
    "param_shardings",
    "replacing",
    "t5",
    "topologies",
    "traffic",
    "with_param_dtype",
]


def make_gpt2_task(size: str, dtype: str) -> Task:
    """Returns a GPT-2's task, computed in ``dtype`` and without text."""
    return make_text_task(ModelOptions(size=size), None, dtype=dtype)

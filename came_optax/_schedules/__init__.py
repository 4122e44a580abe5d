"""How each platform's compiler is led to compute the algorithm with little memory.

A schedule computes what :mod:`came_optax._algorithm` says, in an order or a form that
suits one platform. Each is a file that can be deleted, with its line in `BY_PLATFORM`:
everything works without, but slower.
"""

from collections.abc import Callable
from typing import Any

import jax

from came_optax._schedules import cpu, gpu, tpu
from came_optax._schedules.plain import PLAIN, Schedule, Token, known

BY_PLATFORM = {"cpu": cpu.CPU, "cuda": gpu.GPU, "tpu": tpu.TPU}

__all__ = ["BY_PLATFORM", "PLAIN", "Schedule", "Token", "known", "on_each_platform"]


def on_each_platform(
    function: Callable[..., Any], schedules: dict[str, Schedule], *args: Any
) -> Any:
    """Returns ``function(schedule, *args)`` by the schedule of whatever runs it."""
    branches = {
        platform: _given(function, schedule) for platform, schedule in schedules.items()
    }
    return jax.lax.platform_dependent(
        *args, **branches, default=_given(function, PLAIN)
    )


def _given(function: Callable[..., Any], schedule: Schedule) -> Callable[..., Any]:
    return lambda *args: function(schedule, *args)

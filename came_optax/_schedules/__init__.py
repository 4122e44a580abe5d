"""How each platform's compiler is led to compute the algorithm with little memory.

A schedule computes what :mod:`came_optax._algorithm` says, in an order or a form that
suits one platform. Each is a file that can be deleted, with its line in `BY_PLATFORM`:
everything works without, but slower.
"""

from came_optax._schedules import cpu, gpu, tpu
from came_optax._schedules.plain import PLAIN, Schedule

BY_PLATFORM = {"cpu": cpu.CPU, "cuda": gpu.GPU, "tpu": tpu.TPU}

__all__ = ["BY_PLATFORM", "PLAIN", "Schedule"]

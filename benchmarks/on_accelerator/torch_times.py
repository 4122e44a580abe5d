"""The time of one update in PyTorch, on the same shapes and the same device."""

import importlib.util
import statistics
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from measuring import updates
from update import TorchUpdate, time_in_turn

from on_accelerator.recorder import Recorder, Skipped
from on_accelerator.update_times import AT_ONCE, MODELS, ROUNDS

OPTIMIZERS = {
    "PyTorch AdamW (fused)": "AdamW",
    "PyTorch CAME": "CAME",
    "PyTorch CAME, compiled": "CAME",
}


class Repeated:
    """Repeated updates by a PyTorch optimizer."""

    def __init__(self, optimizer: str, grads: Any, device: str):
        import torch

        self.update = TorchUpdate(OPTIMIZERS[optimizer], grads, device)
        self.step = self.update.step
        if optimizer.endswith("compiled"):
            self.step = torch.compile(self.step)
        self.synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None

    def __call__(self) -> None:
        """Makes some updates."""
        for _ in range(AT_ONCE):
            self.step()
        self.synchronize()


def run(record: Recorder, model: str, optimizers: Sequence[str]) -> None:
    """Records times of AdamW and of the authors' CAME; JAX itself is on the CPU."""
    with record.attempt(model=model, optimizer="PyTorch"):
        if importlib.util.find_spec("torch") is None:
            raise Skipped("torch is not installed")
        device = device_of(record.nano)
        shapes = MODELS[model](record.nano)
        for dtype in ("float32", "bfloat16"):
            grads = updates.random_like(shapes, jnp.dtype(dtype))
            about = {"model": model, "param_dtype": dtype}
            measure(record, about, optimizers, grads, device)


def device_of(nano: bool) -> str:
    """Returns the name of PyTorch's device."""
    import torch

    if nano:
        return "cpu"
    if not torch.cuda.is_available():
        raise Skipped("PyTorch finds no GPU")
    return "cuda"


def measure(
    record: Recorder,
    about: dict[str, str],
    optimizers: Sequence[str],
    grads: Any,
    device: str,
) -> None:
    """Records a row for each optimizer."""
    contestants: dict[str, Repeated] = {}
    for name in optimizers:
        with record.attempt(**about, optimizer=name):
            if "CAME" in name and importlib.util.find_spec("came_pytorch") is None:
                raise Skipped("came-pytorch is not installed")
            contestants[name] = Repeated(name, grads, device)
            contestants[name]()  # Compiles, and what fails fails here.
    seconds = time_in_turn(contestants, ROUNDS[record.size])
    for name, contestant in contestants.items():
        update = [s / AT_ONCE for s in seconds[name]]
        row = about | {
            "optimizer": name,
            "parameters": updates.number(grads),
            "ms": 1e3 * statistics.median(update),
            "state": contestant.update.state_bytes,
            "all ms": [round(1e3 * s, 4) for s in update],
        }
        record.write(**row)

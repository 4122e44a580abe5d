"""Training steps, compiled for one chip that need not be there."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from came_optax import BalancedSplit, Stacked, came_muon, with_master_weights
from measuring import chips, output
from measuring.examples import Target, Task, ahead_of_time, devices, topologies
from measuring.optimizers import OPTAX, OURS, Make, in_float32

CHIPS = ("v5e", "h100")
STACKED = Stacked(BalancedSplit(min_dim_size=2), where="/stack/")


def _wide(make: Make) -> Make:
    return lambda: in_float32(make())


# Of 16-bit parameters; as float32 they are trained without.
MASTER_WEIGHTS: Mapping[str, Make] = {
    f"{name}, int8, 24-bit weights": lambda tx=tx: with_master_weights(tx(), bits=24)
    for name, tx in {
        "steady_came": OURS["steady_came, int8"],
        "came_muon": partial(came_muon, 1e-3, weight_decay=0.1, factoring=STACKED),
    }.items()
}
# In the paper Adafactor has momentum.
OPTIMIZERS: Mapping[str, Make] = {
    **OURS,
    **MASTER_WEIGHTS,
    **{k: _wide(m) for k, m in OPTAX.items() if k != "Adafactor"},
}


def one_chip(name: str) -> Target:
    """Returns one chip to compile for; call it before anything else uses JAX."""
    topologies.set_effort(-1.0)
    target = chips.target(name)
    return dataclasses.replace(target, devices=target.devices[:1])


def compile_step(
    task: Task,
    optimizer: str,
    target: Target,
) -> dict[str, Any]:
    """Returns what the training step of one sequence takes.

    Parameters and state are donated. The state is in float32 whatever the parameters
    are, except CAME's momentum.
    """
    tx = OPTIMIZERS[optimizer]()
    mesh = devices.make_mesh({}, target.devices)
    report = ahead_of_time.compile_train_step(task, tx, target, mesh, batch_size=1)
    fits = report.fits
    if target.devices[0].platform == "tpu":
        # The compiler's verdict: its count of what it accepts can exceed the memory.
        fits = "temporaries" in report.memory
    return {
        "parameters": report.parameters,
        "bytes": report.total,
        "fits": fits,
        "by kind": dict(report.memory),
        "seconds": round(report.seconds, 1),
    }


_SEPARATOR = " | "  # Between the parts of a key.


class Results:
    """What was compiled before, in a JSON file."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        self.steps = self._read()

    def get(self, *key: Any, make: Callable[[], Any]) -> Any:
        """Returns what stands under a key, making and storing it if nothing does."""
        name = _SEPARATOR.join(map(str, key))
        if name not in self.steps:
            made = make()
            print(f"{name}: {made}", flush=True)
            self.steps = self._read() | {name: made}
            lines = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in self.steps.items()]
            output.replace(self.path, "{\n" + ",\n".join(lines) + "\n}")
        return self.steps[name]

    def find(self, *key: Any) -> Any:
        """Returns what stands under a key, or None."""
        return self.steps.get(_SEPARATOR.join(map(str, key)))

    def items(self) -> list[tuple[list[str], Any]]:
        """Returns keys, split, and what stands under them."""
        return [(name.split(_SEPARATOR), step) for name, step in self.steps.items()]

    def _read(self) -> dict[str, Any]:
        if not self.path.exists():
            return {}
        steps: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
        return steps

"""How long does an update take on this machine?

Times jitted updates that donate parameters and state, `apply_updates` included, of the
optimizers in turn: one update each a round. Times are medians over the rounds, and the
ratios medians of those to AdamW in the same round, so that what else the machine does
cancels out. Bytes are what the compiled kernels read and write, each array that one of
them uses once. Page faults are what fresh memory costs: each maps 4 kB, or more where
the kernel has larger pages. PyTorch's AdamW and the authors' CAME join in where torch
is installed:

    pip install -e ".[parity]"
    python benchmarks/update.py --rounds 20
"""

import argparse
import importlib.util
import pathlib
import resource
import statistics
from collections.abc import Callable
from typing import Any

import jax
from measuring import output
from measuring.examples import gpt2
from measuring.optimizers import AS_WRITTEN, OPTIMIZERS, ORTHOGONALIZING
from measuring.updates import (
    BASELINE,
    Update,
    number,
    random_like,
    ratios,
    time_in_turn,
)
from measuring.zoo import gpt2_shapes


class TorchUpdate:
    """The same by a PyTorch optimizer, one of `AdamW` and `CAME`."""

    def __init__(self, name: str, grads: Any):
        import torch

        params = []
        for grad in jax.tree.leaves(grads):
            shared = torch.from_dlpack(grad)
            params.append(torch.nn.Parameter(shared.clone()))
            params[-1].grad = shared
        if name == "AdamW":
            optimizer = torch.optim.AdamW(params, 1e-3, weight_decay=0.1, fused=True)
        else:
            import came_pytorch

            optimizer = came_pytorch.CAME(params, 1e-3, weight_decay=0.1)
        self.step = optimizer.step
        self.step()  # Makes the state.
        self.state = [
            value
            for state in optimizer.state.values()
            for value in state.values()
            if torch.is_tensor(value)
        ]

    def __call__(self) -> None:
        """Makes one update."""
        self.step()


def page_faults(contestant: Callable[[], None]) -> int:
    """Returns how many pages the kernel maps while a contestant runs once."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    contestant()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=gpt2.SIZES, default="small")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--output", type=pathlib.Path, default=output.DEFAULT)
    args = parser.parse_args()

    grads = random_like(gpt2_shapes(args.size))
    updates = {
        name: Update(make(), grads)
        for name, make in {**OPTIMIZERS, **AS_WRITTEN}.items()
        if name != "SGD"
    }
    contestants: dict[str, Any] = dict(updates)
    if importlib.util.find_spec("came_pytorch"):
        contestants["PyTorch AdamW (fused)"] = TorchUpdate("AdamW", grads)
        contestants["PyTorch CAME"] = TorchUpdate("CAME", grads)
    # Beside the others they would leave the caches cold.
    slow = [name for name in contestants if name in (BASELINE, *ORTHOGONALIZING)]
    seconds = time_in_turn({k: contestants[k] for k in slow}, min(args.rounds, 3))
    slow_ratios = {name: ratios(seconds, name) for name in slow}
    others = [name for name in contestants if name == BASELINE or name not in slow]
    seconds |= time_in_turn({k: contestants[k] for k in others}, args.rounds)
    to_baseline = slow_ratios | {name: ratios(seconds, name) for name in others}
    rows = []
    for name, contestant in contestants.items():
        size = sum(x.nbytes for x in jax.tree.leaves(contestant.state))
        rows.append(
            {
                f"gpt2 {args.size}": name,
                "update (ms)": f"{1e3 * statistics.median(seconds[name]):.1f}",
                "to AdamW": f"{statistics.median(to_baseline[name]):.2f}",
                "page faults": page_faults(contestant),
                "state (MB)": f"{size / 1e6:.1f}",
            }
            | (updates[name].takes if name in updates else {})
        )
    output.write(
        args.output,
        "update_gpt2",
        rows,
        parameters=number(grads),
        leaves=len(jax.tree.leaves(grads)),
        rounds=args.rounds,
        seconds={k: [round(s, 5) for s in v] for k, v in seconds.items()},
        jax=jax.__version__,
    )


if __name__ == "__main__":
    main()

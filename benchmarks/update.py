"""How long does an update take on this machine?

Times jitted updates that donate parameters and state, `apply_updates` included, of the
optimizers in turn: one update each a round. Times are medians over the rounds, and the
ratios medians of those to AdamW in the same round, so that what else the machine does
cancels out. Bytes are what the compiled kernels read and write, each array that one of
them uses once. Page faults are what fresh memory costs: each maps 4 kB, or more where
the kernel has larger pages. PyTorch's AdamW and the authors' CAME join in where torch
is installed:

    pip install "came-optax[parity]"
    python benchmarks/update.py --model gpt2 --rounds 20
"""

import argparse
import importlib.util
import pathlib
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
import tqdm
from measuring import output, updates

from came_optax import state_memory
from compiling.traffic import traffic

MODELS: dict[str, Callable[[], Any]] = {
    "gpt2": updates.gpt2_shapes,
    "bert": updates.bert_shapes,
    "small-leaves": updates.small_shapes,
}
WARMUP = 2  # Rounds that don't count.
BASELINE = "AdamW"


class JaxUpdate:
    """Updates of random parameters by an optax optimizer; also what they take."""

    def __init__(self, tx: optax.GradientTransformation, grads: Any):
        # Not the gradients themselves: they would be donated.
        self.params = jax.tree.map(jnp.copy, grads)
        self.state = jax.jit(tx.init)(self.params)
        self.grads = grads
        jax.clear_caches()  # What another traced would be found again.
        began = time.process_time()
        lowered = updates.make_update(tx).lower(self.params, self.state, grads)
        traced = time.process_time()
        self.update = lowered.compile()
        compiled = time.process_time()
        temporaries = self.update.memory_analysis().temp_size_in_bytes
        moved = traffic(self.update.as_text()).hbm_bytes / updates.number(grads)
        self.takes = {
            "bytes/parameter": f"{moved:.1f}",
            "traced in (CPU s)": f"{traced - began:.1f}",
            "compiled in (CPU s)": f"{compiled - traced:.1f}",
            "temporaries (MB)": f"{temporaries / 1e6:.1f}",
            "state (MB)": f"{state_memory(tx, grads).total / 1e6:.1f}",
        }

    def __call__(self) -> None:
        """Makes one update."""
        self.params, self.state = self.update(self.params, self.state, self.grads)
        jax.block_until_ready((self.params, self.state))


class TorchUpdate:
    """The same by a PyTorch optimizer, one of `AdamW` and `CAME`, on its own device."""

    def __init__(self, name: str, grads: Any, device: str = "cpu"):
        import torch

        params = []
        for grad in jax.tree.leaves(grads):
            shared = torch.from_dlpack(grad).to(device)
            params.append(torch.nn.Parameter(shared.clone()))
            params[-1].grad = shared
        if name == "AdamW":
            optimizer = torch.optim.AdamW(params, 1e-3, weight_decay=0.1, fused=True)
        else:
            import came_pytorch

            optimizer = came_pytorch.CAME(params, 1e-3, weight_decay=0.1)
        self.step = optimizer.step
        self.step()  # Makes the state.
        tensors = [
            value
            for state in optimizer.state.values()
            for value in state.values()
            if torch.is_tensor(value)
        ]
        self.state_bytes = sum(t.nbytes for t in tensors)
        self.takes = {
            "bytes/parameter": "",
            "traced in (CPU s)": "",
            "compiled in (CPU s)": "",
            "temporaries (MB)": "",
            "state (MB)": f"{self.state_bytes / 1e6:.1f}",
        }

    def __call__(self) -> None:
        """Makes one update."""
        self.step()


def time_in_turn(
    contestants: Mapping[str, Callable[[], None]], rounds: int
) -> dict[str, list[float]]:
    """Returns the seconds that each contestant takes in each round."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in tqdm.trange(WARMUP + rounds, unit="round"):
        for name, contestant in contestants.items():
            began = time.perf_counter()
            contestant()
            if turn >= WARMUP:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def page_faults(contestant: Callable[[], None]) -> int:
    """Returns how many pages the kernel maps while a contestant runs once."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    contestant()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="gpt2")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--output", type=pathlib.Path, default=output.DEFAULT)
    args = parser.parse_args()

    grads = updates.random_like(MODELS[args.model]())
    contestants: dict[str, Any] = {
        name: JaxUpdate(make(), grads)
        for name, make in updates.OPTIMIZERS.items()
        if name != "SGD"
    }
    if importlib.util.find_spec("came_pytorch"):
        contestants["PyTorch AdamW (fused)"] = TorchUpdate("AdamW", grads)
        contestants["PyTorch CAME"] = TorchUpdate("CAME", grads)
    seconds = time_in_turn(contestants, args.rounds)
    rows = [
        {
            args.model: name,
            "update (ms)": f"{1e3 * statistics.median(seconds[name]):.1f}",
            "to AdamW": f"{statistics.median(ratios(seconds, name)):.2f}",
            "page faults": page_faults(contestant),
        }
        | contestant.takes
        for name, contestant in contestants.items()
    ]
    output.write(
        args.output,
        f"update_{args.model.replace('-', '_')}",
        rows,
        parameters=updates.number(grads),
        leaves=len(jax.tree.leaves(grads)),
        rounds=args.rounds,
        seconds={k: [round(s, 5) for s in v] for k, v in seconds.items()},
        jax=jax.__version__,
    )


def ratios(seconds: Mapping[str, list[float]], name: str) -> list[float]:
    """Returns what a contestant took of the baseline's time, round by round."""
    pairs = zip(seconds[name], seconds[BASELINE], strict=True)
    return [mine / baseline for mine, baseline in pairs]


if __name__ == "__main__":
    main()

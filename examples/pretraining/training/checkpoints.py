"""Checkpoints in Orbax: parameters, optimizer state, step, data position, options.

Orbax writes a checkpoint under a temporary name and renames it when it is whole, and
drops an older one only then: what is there is complete, whenever the process dies.
"""

import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from pretraining.errors import UserError
from pretraining.training.step import TrainState


class Checkpoints:
    """The checkpoints of one run, in `<run>/checkpoints`; the newest two are kept.

    Args:
        run: The run's folder.
        read_only: Leaves what a dead process has half written to the one that saves.
            Orbax removes it in the background, and two removing it fail.
    """

    def __init__(self, run: Path, *, read_only: bool = False):
        _say_a_failure_once()
        self._folder = run / "checkpoints"
        self._manager = ocp.CheckpointManager(
            self._folder.absolute(),
            item_names=("state", "about"),
            options=ocp.CheckpointManagerOptions(
                read_only=read_only,  # Turns the next two off.
                max_to_keep=2,
                cleanup_tmp_directories=True,
                # The next step donates the arrays that would still be written.
                enable_async_checkpointing=False,
            ),
        )

    @property
    def latest_step(self) -> int | None:
        """The step of the newest whole checkpoint."""
        return self._manager.latest_step()

    def save(self, state: TrainState, **about: Any) -> None:
        """Saves the state and `about`, which is JSON, unless that step is saved.

        Raises:
            UserError: The folder is full or not writable. Older checkpoints stay.
        """
        step = int(state.step)
        if step == self.latest_step:
            return
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state._asdict()),
            about=ocp.args.JsonSave(about | {"layout": _layout(state)}),
        )
        try:
            self._manager.save(step, args=args)
        except (ValueError, OSError) as error:  # TensorStore raises ValueError.
            kept = self.latest_step
            raise UserError(
                f"{self._folder}: cannot save step {step}: {_reason(error)}; "
                + (f"step {kept} is safe" if kept is not None else "nothing saved yet")
            ) from error

    def load_about(self) -> dict[str, Any]:
        """Returns what the newest checkpoint says about its run."""
        return self._restore("about", ocp.args.JsonRestore())

    def restore(self, init: Callable[[], TrainState]) -> TrainState:
        """Returns the newest state.

        Args:
            init: The jitted function that makes a new run's state; it tells shapes,
                dtypes and shardings.

        Raises:
            UserError: It is damaged, or of another model or optimizer.
        """
        # From the compiled function, as only that knows the shardings.
        state = init.eval_shape()
        saved, wanted = self.load_about()["layout"], _layout(state)
        for name in sorted(saved.keys() | wanted.keys()):
            if saved.get(name) != wanted.get(name):
                raise UserError(
                    f"{self._folder / str(self.latest_step)}: of another model or "
                    f"optimizer: {name} is {saved.get(name, 'absent')} there and "
                    f"{wanted.get(name, 'absent')} here"
                )
        restored = self._restore("state", ocp.args.StandardRestore(state._asdict()))
        return TrainState(**restored)

    def _restore(self, item: str, args: Any) -> Any:
        step = self.latest_step
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**{item: args}))[
                item
            ]
        except (ValueError, KeyError, OSError) as error:
            older = [s for s in self._manager.all_steps() if s != step]
            raise UserError(
                f"{self._folder / str(step)}: damaged checkpoint ({_reason(error)})"
                + (f"; delete it to go on from step {max(older)}" if older else "")
            ) from error


def _layout(state: Mapping[str, Any] | TrainState) -> dict[str, str]:
    """Describes each leaf, e.g. {"params/wte/embedding": "float32[2048,128]"}."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (
            f"{leaf.dtype}{list(leaf.shape)}".replace(" ", "")
        )
        for path, leaf in jax.tree.leaves_with_path(state)
    }


def _say_a_failure_once() -> None:
    """Silences what Orbax prints of a failed save besides the exception it raises.

    It logs the exception with its traceback, then closes its event loop when the first
    array fails. TensorStore ends the others in its own threads and for a while after,
    each with a traceback, a coroutine that nobody awaits or an exception that nobody
    retrieves.
    """
    for logger in ("absl", "asyncio"):
        logging.getLogger(logger).setLevel(logging.CRITICAL)
    late = r"Event loop is closed|coroutine '.*write_fragment' was never awaited"
    warnings.filterwarnings("ignore", late, RuntimeWarning)
    report = sys.unraisablehook

    def report_others(unraisable: Any) -> None:
        if not re.match(late, str(unraisable.exc_value)):
            report(unraisable)

    sys.unraisablehook = report_others


def _reason(error: Exception) -> str:
    """Finds the few words that matter in TensorStore's message."""
    code = re.search(r"os_error_code='(\d+)'", str(error))
    if code:
        return os.strerror(int(code[1]))
    return str(error).partition("\n")[0][:200]

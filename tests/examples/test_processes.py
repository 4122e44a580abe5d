"""Two processes of four devices train as one process of eight does."""

import shutil
import socket
import subprocess
import sys
from concurrent import futures

import chex
import jax
import orbax.checkpoint as ocp
import pytest

from running import metrics
from tests.examples.launching import ROOT, environment

SCRIPT = ROOT / "examples" / "pretrain_gpt2.py"
OPTIONS = (
    *("--text", "text.txt", "--vocab-size", "300", "--size", "nano", "--seq-len", "8"),
    *("--batch-size", "16", "--steps", "20", "--learning-rate", "1e-3"),
    *("--mesh", "data=2,fsdp=4", "--log-every", "1", "--eval-every", "20"),
    *("--checkpoint-every", "10"),
)
SECONDS = 120


def pretrain(processes, folder, *options):
    """Runs the example in several processes at once; returns what each prints."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = f"--xla_force_host_platform_device_count={8 // processes}"
    variables = environment(folder.parent, XLA_FLAGS=flags)
    if processes > 1:
        variables["JAX_COORDINATOR_ADDRESS"] = f"localhost:{port}"
        variables["JAX_NUM_PROCESSES"] = str(processes)

    def run(index):
        return subprocess.run(
            [sys.executable, str(SCRIPT), "--output", str(folder), *options],
            cwd=folder.parent,
            env=variables | {"JAX_PROCESS_ID": str(index)},
            capture_output=True,
            text=True,
            timeout=SECONDS,  # Then it is killed: it may wait for another.
        )

    with futures.ThreadPoolExecutor() as pool:
        done = list(pool.map(run, range(processes)))
    assert not any(process.returncode for process in done), done
    return [process.stdout for process in done]


def read_run(folder, like=None):
    """Returns the losses of a run, and the arrays of its last checkpoint.

    What other processes saved takes arrays `like` it to be loaded into this one.
    """
    rows = metrics.read(folder)
    losses = {
        name: [row[name] for row in rows if name in row]
        for name in ("step", "loss", "validation_loss")
    }
    with ocp.StandardCheckpointer() as checkpointer:
        saved = checkpointer.restore(folder / "checkpoints" / "20" / "state", like)
    return losses, jax.device_get(saved)


def matrices(state):
    return [x for name, x in state.items() if name.startswith("params.") and x.ndim > 1]


@pytest.mark.nightly
def test_either_goes_on_where_the_other_stopped(tmp_path):
    sentences = (f"Sentence {i} says {i * i} times {i % 7}.\n" for i in range(500))
    (tmp_path / "text.txt").write_text("".join(sentences))
    folders = {1: tmp_path / "one", 2: tmp_path / "two"}
    (alone,) = pretrain(1, folders[1], *OPTIONS)
    first, second = pretrain(2, folders[2], *OPTIONS)
    assert "validation loss" in alone and "validation loss" in first
    assert not [line for line in second.splitlines() if "Gloo" not in line]

    losses, state = read_run(folders[1])
    assert losses["step"] == [*range(1, 21), 20]
    assert losses["loss"][-1] < losses["loss"][0] - 1
    expected = [*losses["loss"], *losses["validation_loss"]]

    def check(folder):
        found, found_state = read_run(folder, like=state)
        assert found["step"] == losses["step"]
        assert [*found["loss"], *found["validation_loss"]] == pytest.approx(
            expected, rel=1e-5
        )
        chex.assert_trees_all_equal_shapes_and_dtypes(found_state, state)
        # Gradients of the keys' biases are rounding alone, which CAME scales up.
        chex.assert_trees_all_close(matrices(found_state), matrices(state), atol=1e-4)

    check(folders[2])
    for before, after in (1, 2), (2, 1):
        resumed = tmp_path / f"resumed-by-{after}"
        shutil.copytree(folders[before], resumed)
        shutil.rmtree(resumed / "checkpoints" / "20")
        pretrain(after, resumed, "--resume")
        check(resumed)

"""Runs that are killed at random instants.

`make test-all ARGS="-m nightly tests/examples/test_nightly.py"` takes hours: each run
ends with the bits of one that nothing stopped, or is refused in a line that leads on.
"""

import functools
import json
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from running.folder import steps
from tests.examples.launching import ROOT, environment

pytestmark = pytest.mark.nightly

SEQUENCES = 11
SHORT = (
    *("--batch-size", "8", "--seq-len", "16", "--steps", "12", "--log-every", "1"),
    *("--eval-every", "6", "--eval-batches", "1", "--checkpoint-every", "4"),
)
TEXT = ("--text", "text.txt", "--size", "nano")
SCRIPTS = {
    "pretrain_gpt2": (*TEXT, "--vocab-size", "300", *SHORT),
    "pretrain_bert": (*TEXT, "--vocab-size", "150", *SHORT),
    "pretrain_t5": (*TEXT, "--vocab-size", "250", *SHORT),
    "finetune_classifier": ("--pretrained", "bert", "--csv", "text.csv", *SHORT),
    "gpt2_in_one_file": (
        *("--text", "documents/*.txt", "--vocab_size", "300", "--length", "16"),
        *("--batch_size", "8", "--steps", "12", "--save_every", "4"),
    ),
    "compare_optimizers": ("--protocol", "protocol.md"),
}
# Ten runs, of two optimizers.
PROTOCOL = """
```toml
corpora = ["text.txt"]

[grid]
learning_rate = [1e-3, 1e-2]
b1 = [0.9]
b2 = [0.95]
weight_decay = [0.1]
warmup = [0.1]

[task.gpt2-small]
model = { vocab_size = 300, n_positions = 16, n_embd = 12, n_layer = 1, n_head = 2 }
batch_size = 8
evaluations = 2

[optimizer.adamw]
make = "comparing.optimizers:adamw"
start = { learning_rate = 1e-3, b1 = 0.9, b2 = 0.95, weight_decay = 0.1, warmup = 0.1 }

[optimizer.nadamw]
make = "comparing.optimizers:nadamw"
start = { learning_rate = 1e-3, b1 = 0.9, b2 = 0.95, weight_decay = 0.1, warmup = 0.1 }

[[part]]
name = "tune"
kind = "tune"
task = "gpt2-small"
tokens_per_parameter = 2
optimizers = ["adamw", "nadamw"]
runs = 3
repeats = 1
seeds = [100, 101]

[[part]]
name = "judge"
kind = "judge"
task = "gpt2-small"
tokens_per_parameter = 20
settings = "tune"
optimizers = ["adamw", "nadamw"]
seeds = [0, 1]
```
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a text, documents and a CSV file."""
    folder = tmp_path_factory.mktemp("kills")
    lines = [f"The quick brown fox {i} jumps over {i * i} dogs.\n" for i in range(400)]
    (folder / "text.txt").write_text("".join(lines))
    (folder / "protocol.md").write_text(PROTOCOL)
    rows = [f"{line[:-1]},{'ab'[i % 2]}\n" for i, line in enumerate(lines)]
    (folder / "text.csv").write_text("text,label\n" + "".join(rows))
    (folder / "documents").mkdir()
    for i in range(40):
        document = "".join(lines[10 * i : 10 * i + 10])
        (folder / "documents" / f"{i}.txt").write_text(document)
    return folder


def start(folder, script, output, *arguments):
    flag = "--folder" if script == "gpt2_in_one_file" else "--output"
    path = str(ROOT / "examples" / f"{script}.py")
    return launch(folder, [sys.executable, path, flag, output, *arguments])


def launch(folder, command):
    return subprocess.Popen(
        command,
        cwd=folder,
        # On a busy machine it warns of slow compilation.
        env=environment(folder, TF_CPP_MIN_LOG_LEVEL="3"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    began = time.monotonic()
    _, error = process.communicate()
    assert (process.returncode, lines_of(error)) == (0, [])
    return time.monotonic() - began


def lines_of(error):
    """Returns what is ours: on a busy machine libraries say that things take long."""
    return [line for line in error.splitlines() if not line.startswith("WARNING:")]


def signs_of(script):
    """Patterns of what is in a run's folder when it is about to save, and to end."""
    if script == "compare_optimizers":
        return {"first": "runs.jsonl", "last": "*.md"}
    states = "" if script == "gpt2_in_one_file" else "checkpoints/"
    return {"first": f"{states}*4*", "last": f"{states}12"}


def go_on(place, name, script, error):
    """Starts what is to be started next, as a user would who reads."""
    if "Continue: " in error:
        return launch(place, ["sh", "-c", "exec " + error.partition(" && ")[2]])
    if script.startswith(("pretrain", "finetune")) and steps(place / name):
        return start(place, script, name, "--resume")
    return start(place, script, name, *SCRIPTS[script])


def wait(process, folder, sign, rng):
    """Waits for an instant soon after the folder has what the sign stands for."""
    while process.poll() is None and not any(folder.glob(sign)):
        time.sleep(0.001)
    time.sleep(rng.choice([0.05, 0.5, 2]) * rng.random())


def check_told(script, process, number, error):
    """A kill by a signal says nothing, all else ends in a line that leads on."""
    lines, code = lines_of(error), process.returncode
    if number == signal.SIGINT and code in (1, -number):
        # Python's own way to stop, before a script's main function.
        assert "in main" not in error
        assert "in train" not in error
    elif number != signal.SIGKILL and code == 130:
        assert lines[0].startswith(f"{script}.py: interrupted")
        assert "saved in" not in lines[0] or lines[1].startswith("Continue: cd ")
        assert len(lines) == 1 + ("saved in" in lines[0])
    else:
        assert code in (0, -number)
        assert lines == []


def outcome(folder, script):
    """Returns all that a run leaves, but for times."""
    if script == "compare_optimizers":
        rows = [
            json.loads(line)
            for line in (folder / "runs.jsonl").read_text().splitlines()
        ]
        for row in rows:
            row.pop("seconds")
        assert len(rows) == 10
        return rows
    name = "12/default" if script == "gpt2_in_one_file" else "checkpoints/12/state"
    with ocp.StandardCheckpointer() as checkpointer:
        state = checkpointer.restore((folder / name).absolute())
    if script == "gpt2_in_one_file":
        return state
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    for row in rows:
        row.pop("tokens_per_second", None)
    exported = {
        path.name: path.read_bytes()
        for path in folder.glob("*.safetensors")  # And not a temporary one.
    }
    return state, rows, exported


@pytest.fixture(scope="module")
def straight(place):
    """Returns what a script leaves that nothing stops, and how long it takes."""

    @functools.cache
    def run(script):
        if script == "finetune_classifier":
            finish(start(place, "pretrain_bert", "bert", *SCRIPTS["pretrain_bert"]))
        name = f"{script}-straight"
        finish(start(place, script, name, *SCRIPTS[script]))  # Fills the caches.
        shutil.rmtree(place / name)
        seconds = finish(start(place, script, name, *SCRIPTS[script]))
        return seconds, outcome(place / name, script)

    return run


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("sequence", range(SEQUENCES))
def test_killed_at_random_instants_ends_with_the_same_bits(
    place, straight, script, sequence
):
    seconds, expected = straight(script)
    name = f"{script}-{sequence}"
    kill_and_go_on(place, name, script, seconds, random.Random(name))
    found = outcome(place / name, script)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def kill_and_go_on(place, name, script, seconds, rng):
    """Runs a script to its end, killed once or more on the way."""
    folder, error = place / name, ""
    for _ in range(rng.randint(1, 2)):
        process = go_on(place, name, script, error)
        number = rng.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
        moment = rng.choice(["any", "any", "first", "last"])
        sign = signs_of(script).get(moment)
        began = time.monotonic()
        if sign is None or any(folder.glob(sign)):
            time.sleep(rng.uniform(0, seconds))
        else:
            wait(process, folder, sign, rng)
        there = " ".join(sorted(path.name for path in folder.glob("checkpoints/*")))
        process.send_signal(number)
        if number == signal.SIGINT and rng.random() < 0.3:
            time.sleep(rng.uniform(0, 0.5))
            process.send_signal(number)  # Impatient.
        after = time.monotonic() - began
        _, error = process.communicate()
        print(
            f"{name}: {number.name} after {after:.1f} of {seconds:.1f} s ({moment}; "
            f"{there}): {process.returncode}: {error}",
            flush=True,
        )
        check_told(script, process, number, error)
    finish(go_on(place, name, script, error))

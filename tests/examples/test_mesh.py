"""Training on meshes: the same losses on each, parameters and state in parts."""

import functools
import math

import chex
import jax
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import tasks.bert
import tasks.gpt2
import tasks.t5
from came_optax import came, came_muon
from models import bert, gpt2, t5
from task import Task, UserError
from tests.examples.stepping import train
from training import optimizers, sharding, step

BATCH_SIZE, LENGTH, VOCABULARY = 16, 8, 24


def ids(*shape: int, below: int = VOCABULARY) -> np.ndarray:
    generator = np.random.default_rng(math.prod(shape))
    return generator.integers(below, size=(BATCH_SIZE, *shape), dtype=np.int32)


def make_task(model, config, loss_fn) -> Task:
    return Task(
        name="mock",
        make_model=lambda rngs: model(config, rngs=rngs),
        loss_fn=loss_fn,
        train=[],
        validation=[],
        tokens_per_record=LENGTH,
    )


GPT2 = make_task(
    gpt2.GPT2,
    gpt2.GPT2Config(VOCABULARY, LENGTH, n_embd=32, n_layer=1, n_head=8),
    tasks.gpt2.next_token_loss,
)
BERT = make_task(
    bert.MaskedLM,
    bert.BERTConfig(VOCABULARY, LENGTH, 2, 32, 64, 1, 8),
    tasks.bert.masked_token_loss,
)
T5 = make_task(
    t5.T5, t5.T5Config(VOCABULARY, 32, 4, 64, 1, 1, 8), tasks.t5.target_token_loss
)
WEIGHT = np.ones(BATCH_SIZE, np.float32)
CASES = {
    "gpt2": (GPT2, {"tokens": ids(LENGTH + 1), "weight": WEIGHT}),
    "bert": (
        BERT,
        {
            "tokens": ids(LENGTH),
            "positions": ids(2, below=LENGTH),
            "targets": ids(2),
            "weight": WEIGHT,
        },
    ),
    "t5": (T5, {"inputs": ids(LENGTH), "targets": ids(LENGTH // 2), "weight": WEIGHT}),
}
TX = came(1e-3, weight_decay=0.1)


@functools.cache
def losses_on_one_device(name):
    task, batch = CASES[name]
    return train(task, TX, batch, sharding.make_mesh({}, jax.devices()[:1]))[1]


@pytest.mark.parametrize(
    ("name", "sizes", "accumulate"),
    [
        ("gpt2", {"data": 2, "fsdp": 2, "tensor": 2}, 2),
        pytest.param("gpt2", {"fsdp": 8}, 1, marks=pytest.mark.nightly),
        pytest.param("gpt2", {"tensor": 8}, 1, marks=pytest.mark.nightly),
        pytest.param("bert", {"fsdp": 4, "tensor": 2}, 1, marks=pytest.mark.nightly),
        pytest.param("t5", {"fsdp": 4, "tensor": 2}, 1, marks=pytest.mark.nightly),
    ],
)
def test_losses_do_not_depend_on_the_mesh(name, sizes, accumulate):
    (task, batch), mesh = CASES[name], sharding.make_mesh(sizes)
    state, losses = train(task, TX, batch, mesh, accumulate=accumulate)
    assert losses[0] > losses[2]
    assert losses == pytest.approx(losses_on_one_device(name), rel=1e-5)
    parts = [p.addressable_data(0).size for p in jax.tree.leaves(state.params)]
    whole = [p.size for p in jax.tree.leaves(state.params)]
    # All matrices are in parts, but those of positions and segments on "tensor".
    assert sum(parts) < 0.5 * sum(whole)


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param({"fsdp": 4, "tensor": 2}, marks=pytest.mark.slow),
        pytest.param({"fsdp": 8}, marks=pytest.mark.nightly),
    ],
    ids=str,
)
def test_came_muon_does_not_depend_on_the_mesh(sizes, monkeypatch):
    few = functools.partial(came_muon, ns_coeffs=((3.4, -4.8, 2.0),))
    monkeypatch.setitem(optimizers.CAME, "came-muon", few)

    def loss(mesh):
        tx = optimizers.make_optimizer(
            optimizers.OptimizerOptions("came-muon", mu_dtype="float32"),
            lambda count: 1e-3,
            params_sharding=step.params_sharding(GPT2, mesh),
        )
        return train(GPT2, tx, CASES["gpt2"][1], mesh)[1][-1]

    alone = sharding.make_mesh({}, jax.devices()[:1])
    assert loss(sharding.make_mesh(sizes)) == pytest.approx(loss(alone), rel=1e-5)


@pytest.mark.parametrize(
    ("sizes", "kernel", "joining", "embedding"),
    [
        ({"data": 8}, P(), P(), P()),
        ({"fsdp": 8}, P(None, "fsdp"), P("fsdp"), P(None, "fsdp")),
        ({"tensor": 8}, P(None, "tensor"), P("tensor"), P("tensor")),
        (
            {"fsdp": 4, "tensor": 2},
            P("fsdp", "tensor"),
            P("tensor", "fsdp"),
            P("tensor", "fsdp"),
        ),
        # 3 divides no more than the vocabulary of 24.
        ({"data": 2, "tensor": 3}, P(), P(), P("tensor")),
    ],
)
def test_parameters_and_state_are_split(sizes, kernel, joining, embedding):
    chips = jax.devices()[: math.prod(sizes.values())]
    mesh = sharding.make_mesh(sizes, chips)
    shapes = step.state_shapes(GPT2, TX, mesh)
    mu = optax.tree.get(shapes.opt_state, "mu")
    for tree in shapes.params, mu:
        block = tree["h"][0]
        for leaf, spec in [
            (block["mlp"]["c_fc"]["kernel"], kernel),
            (block["mlp"]["c_proj"]["kernel"], joining),
            (tree["wte"]["embedding"], embedding),
            (block["ln_1"]["scale"], P()),
        ]:
            x = leaf.get_value()
            wanted = jax.NamedSharding(mesh, spec)
            assert x.sharding.is_equivalent_to(wanted, x.ndim)


def test_mesh_takes_what_is_given_and_data_the_rest():
    assert sharding.make_mesh().shape == {"data": 8, "fsdp": 1, "tensor": 1}
    assert sharding.mesh_sizes("auto") == {}  # Takes back one given before.
    given = sharding.mesh_sizes("fsdp=2,tensor=2")
    assert sharding.make_mesh(given).shape == {"data": 2, "fsdp": 2, "tensor": 2}
    chex.assert_equal(sharding.data_part(sharding.make_mesh(given)), (0, 1))


@pytest.mark.parametrize("text", ["", "fsdp", "fsdp=0", "pipe=2", "data=2,data=2"])
def test_mesh_is_read_or_refused(text):
    with pytest.raises(UserError, match="must be like data=2,fsdp=4"):
        sharding.mesh_sizes(text)


@pytest.mark.parametrize("sizes", [{"fsdp": 3}, {"data": 16}, {"data": 2}])
def test_mesh_must_fit_the_devices(sizes):
    with pytest.raises(UserError, match=r"--mesh .*: there are 8 devices"):
        sharding.make_mesh(sizes)


class Chip:
    def __init__(self, process_index: int):
        self.process_index = process_index


class FakeMesh:
    """Chips of some processes in a mesh of 4 x 2, batches split over the 4."""

    def __init__(self, processes: list[int]):
        self.devices = np.array([Chip(p) for p in processes]).reshape(4, 1, 2)
        self.shape = {"data": 4, "fsdp": 1, "tensor": 2}


@pytest.mark.parametrize(
    ("processes", "parts"),
    [
        ([0, 0, 0, 0, 1, 1, 1, 1], [(0, 2), (1, 2)]),
        ([0, 0, 1, 1, 2, 2, 3, 3], [(0, 4), (1, 4), (2, 4), (3, 4)]),
        # The tensor axis spans two processes: they load the same sequences.
        ([0, 1, 0, 1, 0, 1, 0, 1], [(0, 1), (0, 1)]),
    ],
)
def test_each_process_loads_its_part(monkeypatch, processes, parts):
    for index, part in enumerate(parts):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        assert sharding.data_part(FakeMesh(processes)) == part


def test_scattered_processes_are_refused(monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 0)
    with pytest.raises(UserError, match="must be neighbours"):
        sharding.data_part(FakeMesh([0, 0, 1, 1, 0, 0, 1, 1]))

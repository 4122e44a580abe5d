"""Snippets of "In your code base", each in a stand-in for that code base.

Caught is a snippet that does not run, a rule that reads a code base's layout wrongly,
and a state that cannot be made, sharded, masked, scanned over or mapped as it is there.
"""

import functools
import re

import chex
import jax
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from came_optax import state_memory, steady_came
from tests import stand_ins
from tests.stand_ins import (
    LEAVES,
    OPTIMIZERS,
    PAGE,
    PARTITION_RULES,
    Config,
    big_vision,
    distance,
    make_params,
    match_partition_rules,
    purejaxrl,
    run_easylm,
    run_equinox,
    run_haiku,
    run_snippets,
    run_t5x,
)

pytestmark = pytest.mark.usefixtures("promotion")


def make_step(tx):
    def step(params, state):
        loss, grads = jax.value_and_grad(distance)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    return step


def falls(step, *carry, steps=30, below=0.8):
    """Steps, and says whether the loss that each step returns has fallen."""
    losses = []
    for _ in range(steps):
        *carry, loss = step(*carry)
        losses.append(float(loss))
    assert losses[-1] < below * losses[0], losses


@jax.jit
def step_of_train_state(state):
    loss, grads = jax.value_and_grad(distance)(state.params)
    return state.apply_gradients(grads=grads), loss


WITH_MUON = ["maxtext", "levanter", "nanodo", "big_vision"]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_statistics_are_those_of_the_matrices_that_kernels_are(name):
    memory = state_memory(OPTIMIZERS[name](), make_params(name))
    factored = {path: leaf for path, leaf in LEAVES[name].items() if "rows" in leaf}
    assert factored
    for found, axis in ((memory.rows, "rows"), (memory.cols, "columns")):
        assert found == {path: tuple(leaf[axis]) for path, leaf in factored.items()}


@pytest.mark.parametrize("name", WITH_MUON)
def test_came_muon_takes_hidden_kernels(name):
    tx = getattr(stand_ins, name)("came_muon")
    groups = state_memory(tx, make_params(name)).groups
    hidden = {path for path, group in groups.items() if group == "hidden"}
    kernels = {path for path, leaf in LEAVES[name].items() if "rows" in leaf}
    assert hidden == {k for k in kernels if not re.search("embedding|logits", k)}


def test_the_page_names_each_code_base():
    anchors = re.findall(r"^\((\w+)\)=$", PAGE, flags=re.M)
    assert anchors == list(OPTIMIZERS) == list(LEAVES)
    links = re.findall(r"\| \[.*?\]\(#(\w+)\) \|", PAGE)
    assert links == [name for name in anchors if name != "experts"]


def test_t5x_derives_the_axes_of_a_state():
    wrapper, params = run_t5x().optimizer_def, make_params("t5x")

    @chex.dataclass
    class State:  # And Optimizer: both have `replace`, as Flax's dataclasses.
        step: object
        param_states: object

    @chex.dataclass
    class Optimizer:
        target: object
        state: object

    state = State(step=0, param_states=wrapper.optax_optimizer.init(params))
    axes = jax.tree.map(lambda p: P(*("embed", "layers", "mlp")[: p.ndim]), params)
    found = wrapper.derive_logical_axes(Optimizer(target=params, state=state), axes)
    assert found.target is axes and found.state.step is None
    layers = optax.tree.get(found.state.param_states, "v_row")["decoder"]["layers"]
    assert layers["mlp"]["wi_0"]["kernel"] == P("embed", "layers")
    structures = [
        jax.tree.structure(tree, is_leaf=lambda x: isinstance(x, P))
        for tree in (found.state.param_states, state.param_states)
    ]
    assert structures[0] == structures[1]


@pytest.mark.slow
def test_easylm_shards_its_train_state_by_rules_for_parameters():
    run, params = run_easylm(), make_params("easylm")
    mesh = jax.make_mesh((2, 4), ("fsdp", "mp"), axis_types=(AxisType.Auto,) * 2)

    def create():
        return TrainState.create(apply_fn=None, params=params, tx=run.optimizer)

    def init(partition):
        place = functools.partial(NamedSharding, mesh)
        is_spec = functools.partial(lambda kind, x: isinstance(x, kind), P)
        shardings = jax.tree.map(place, partition, is_leaf=is_spec)
        return jax.jit(create, out_shardings=shardings)()

    shapes, found = jax.eval_shape(create), run.train_state_partition
    fields = {name: getattr(found, name) for name in ("step", "params", "opt_state")}
    state = init(shapes.replace(**fields))
    rows = optax.tree.get(state.opt_state, "v_row")["transformer"]["h"]["0"]
    assert rows["attention"]["wq"]["kernel"].sharding.spec == P("fsdp")
    with pytest.raises(ValueError, match="incompatible with its sharding annotation"):
        init(match_partition_rules(PARTITION_RULES, shapes))
    falls(step_of_train_state, state)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "make"),
    [*OPTIMIZERS.items()]
    + [(name, lambda n=name: getattr(stand_ins, n)("came_muon")) for name in WITH_MUON],
)
def test_each_trains(name, make):
    tx, params = make(), make_params(name)
    # At learning rates as for training, of 0.001 or so.
    falls(jax.jit(make_step(tx)), params, tx.init(params), below=0.995)


@pytest.mark.slow
def test_big_vision_scales_as_steady_came_does():
    tx, params = big_vision(), make_params("big_vision")
    rule = run_snippets("big_vision", config=Config()).rule
    steady = steady_came(0.1, mu_dtype="int8", factoring=rule)
    keys = iter(jax.random.split(jax.random.key(0), len(LEAVES["big_vision"])))
    # Too small to be clipped by their norm.
    grads = jax.tree.map(
        lambda p: 1e-3 * jax.random.normal(next(keys), p.shape), params
    )
    ours, expected = (
        jax.jit(tx.update)(grads, tx.init(params), params)[0] for tx in (tx, steady)
    )
    chex.assert_trees_all_close(ours, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_haiku_and_equinox_update():
    run = run_haiku()
    new, _ = run.update(run.params, run.opt_state, 1.0)
    assert distance(new) < distance(run.params)
    run = run_equinox()
    model, _ = run.update(run.model, run.opt_state, 1.0)
    assert run.loss_fn(model, 1.0) < run.loss_fn(run.model, 1.0)


@pytest.mark.slow(but=1)
@pytest.mark.parametrize("anneal", [True, False])
def test_purejaxrl_maps_over_seeds_and_scans_over_steps(anneal):
    def train(key):
        params = jax.tree.map(
            lambda p: jax.random.normal(key, p.shape), make_params("purejaxrl")
        )
        state = TrainState.create(apply_fn=None, params=params, tx=purejaxrl(anneal))
        return jax.lax.scan(lambda s, _: step_of_train_state(s), state, None, 30)[1]

    losses = jax.jit(jax.vmap(train))(jax.random.split(jax.random.key(0), 2))
    assert (losses[:, -1] < 0.6 * losses[:, 0]).all()
    assert losses[0, 0] != losses[1, 0]


@pytest.mark.slow
def test_experts_are_updated_as_if_alone():
    experts = jax.random.normal(jax.random.key(0), (2, 4, 32, 48))
    # One expert of the second layer was chosen by no token for a while.
    steps = [*[experts.at[1, 2].set(0)] * 5, experts]

    def last_update(tx, trees):
        state = tx.init(trees[0])
        for tree in trees:
            updates, state = tx.update(tree, state, tree)
        return updates

    trees = [{"layers": {"experts": {"wi": x}}, "experts": {"wo": x[1]}} for x in steps]
    found = last_update(OPTIMIZERS["experts"](), trees)
    expected = last_update(steady_came(1e-3), [x[1, 2] for x in steps])
    for update in found["layers"]["experts"]["wi"][1, 2], found["experts"]["wo"][2]:
        np.testing.assert_allclose(update, expected, rtol=1e-5)

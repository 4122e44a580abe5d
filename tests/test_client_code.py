"""Snippets of "In your code base", each in a stand-in for that code base.

Caught is a snippet that does not run, a rule that reads a code base's layout wrongly,
and a state that cannot be made, sharded, masked, scanned over or mapped as it is there.
A stand-in has the leaves of `client_leaves.toml` and the code base's way of stepping,
and nothing else: its loss is the distance of all parameters from 1.
"""

import contextlib
import dataclasses
import functools
import json
import operator
import pathlib
import re
import sys
import tomllib
import types
from unittest import mock

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from came_optax import state_memory, steady_came

HERE = pathlib.Path(__file__).parent
PAGE = (HERE.parent / "docs" / "in-your-code-base.md").read_text(encoding="utf-8")
LEAVES = tomllib.loads((HERE / "client_leaves.toml").read_text(encoding="utf-8"))


pytestmark = pytest.mark.usefixtures("promotion")


def run_snippets(name, **names):
    """Runs the code under an anchor of the page, among names that are there already."""
    section = re.search(rf"^\({name}\)=$.*?(?=^\(|\Z)", PAGE, flags=re.M | re.S)
    snippets = re.findall(
        r"^```\{code-block\} python\n(.*?)^```$", section[0], flags=re.M | re.S
    )
    assert snippets
    for snippet in snippets:
        exec(snippet, names)
    return types.SimpleNamespace(**names)


def make_params(name):
    """Returns a code base's parameters, all 0."""
    leaves = {path: jnp.zeros(leaf["shape"]) for path, leaf in LEAVES[name].items()}
    return traverse_util.unflatten_dict(leaves, sep="/")


def distance(params, batch=1.0):
    leaves = jax.tree.leaves(params)
    return sum(jnp.mean((p - batch) ** 2) for p in leaves) / len(leaves)


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


class Config(dict):
    """As ml_collections' ConfigDict."""

    __getattr__ = dict.__getitem__
    __setattr__ = dict.__setitem__


# Each code base's optimizer, out of its snippet.


def maxtext(name="came"):
    run = run_snippets("maxtext")
    config = Config(opt_type=run.OptimizerType(name), adam_weight_decay=0.1)
    config |= {"param_scan_axis": 1, "mu_dtype": jnp.dtype("int8")}
    return run.get_optimizer(config, optax.linear_schedule(0.0, 0.1, 5))


def levanter(name="came"):
    """From a module `levanter.optim` with the base class of its configurations."""
    registered = {}

    @dataclasses.dataclass(frozen=True)
    class OptimizerConfig:
        learning_rate: float = 0.1
        weight_decay: float = 0.0

        @classmethod
        def register_subclass(cls, name):
            return lambda subclass: registered.setdefault(name, subclass)

        def lr_scheduler(self, num_train_steps):
            return optax.linear_schedule(self.learning_rate, 0.01, num_train_steps)

        def build_weight_decay_mask(self):
            return lambda model: jax.tree.map(lambda _: True, model)

    optim = types.SimpleNamespace(OptimizerConfig=OptimizerConfig)
    modules = {"levanter": types.SimpleNamespace(optim=optim), "levanter.optim": optim}
    with mock.patch.dict(sys.modules, modules):
        run_snippets("levanter")
    return registered[name](weight_decay=0.0).build(100)


PARTITION_RULES = (
    ("attention/(wq|wk|wv)/kernel", P("fsdp", "mp")),
    ("attention/wo/kernel", P("mp", "fsdp")),
    ("feed_forward/w1/kernel", P("fsdp", "mp")),
    ("feed_forward/w2/kernel", P("mp", "fsdp")),
    (".*", P(None)),
)


def match_partition_rules(rules, tree):
    """As EasyLM's: the first regular expression that matches a path; scalars whole."""

    def spec(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        some = [(".*", P())] if leaf.size <= 1 else rules
        return next(spec for pattern, spec in some if re.search(pattern, name))

    return jax.tree.map_with_path(spec, tree)


def run_easylm():
    # What its state has is known only with its optimizer, hence the same one twice.
    came = steady_came(0.1, mu_dtype="bfloat16")
    tx, params = (
        optax.chain(optax.clip_by_global_norm(1.0), came),
        make_params("easylm"),
    )
    create = functools.partial(TrainState.create, apply_fn=None, params=params, tx=tx)
    return run_snippets(
        "easylm",
        config=Config(clip_gradient=1.0, weight_decay=0.0, bf16_momentum=True),
        learning_rate_schedule=optax.constant_schedule(0.1),
        weight_decay_mask=None,
        match_partition_rules=match_partition_rules,
        partition_rules=PARTITION_RULES,
        train_state_shapes=jax.eval_shape(create),
    )


def nanodo(name="came"):
    return run_snippets("nanodo").came_of(
        Config(optimizer=name, weight_decay=0.0, mu_dtype="int8"),
        optax.constant_schedule(0.1),
        lambda params: jax.tree.map(lambda _: True, params),
    )


def big_vision(name="came"):
    """As `big_vision.optax.make` does, from a configuration that was stored as JSON."""
    config = Config(lr=0.1, grad_clip_norm=1.0)
    with mock.patch.object(optax, "came", None, create=True):  # Undoes the snippet's.
        run_snippets("big_vision", config=config)
        if name == "came_muon":
            config |= {"optax_name": "came.scale_by_came_muon", "optax": {}}
        config = Config(json.loads(json.dumps(config)))
        scale = operator.attrgetter(config.optax_name)(optax)(**config.optax)
    return optax.chain(
        optax.masked(optax.clip_by_global_norm(config.grad_clip_norm), True),
        optax.masked(scale, True),
        optax.scale(config.lr),
        optax.scale_by_schedule(optax.constant_schedule(1.0)),
        optax.scale(-1.0),
    )


def purejaxrl(anneal=True):
    config = {"MAX_GRAD_NORM": 0.5, "LR": 0.1, "ANNEAL_LR": anneal}
    schedule = optax.linear_schedule(config["LR"], 0.0, 60)
    return run_snippets("purejaxrl", config=config, linear_schedule=schedule).tx


def run_haiku():
    params = make_params("haiku")
    return run_snippets("haiku", jax=jax, params=params, loss_fn=distance)


class EquinoxLayer(eqx.Module):
    linear: eqx.nn.Linear
    activation: object = jnp.tanh


class EquinoxModel(eqx.Module):
    layers: EquinoxLayer
    head: eqx.nn.Linear


def run_equinox():
    @eqx.filter_vmap
    def make(key):
        return EquinoxLayer(eqx.nn.Linear(64, 64, key=key))

    keys = jax.random.split(jax.random.key(0), 5)
    model = EquinoxModel(make(keys[:4]), eqx.nn.Linear(64, 8, key=keys[4]))

    def loss_fn(model, batch):
        return distance(eqx.filter(model, eqx.is_inexact_array), batch)

    return run_snippets("equinox", model=model, loss_fn=loss_fn)


def run_t5x():
    """From a module `t5x.optimizers` with the classes that its snippet needs."""

    class OptaxWrapper:
        def __init__(self, optax_optimizer):
            self.optax_optimizer = optax_optimizer

    optimizers = types.SimpleNamespace(OptaxWrapper=OptaxWrapper)
    with mock.patch.dict(
        sys.modules, {"t5x": types.SimpleNamespace(optimizers=optimizers)}
    ):
        return run_snippets("t5x", schedule=optax.constant_schedule(0.1))


def penzai():
    class StatefulTrainer:
        @staticmethod
        def build(*, root_rng, model, optimizer_def, loss_fn):
            return optimizer_def

    training = types.SimpleNamespace(StatefulTrainer=StatefulTrainer)
    toolshed = types.SimpleNamespace(basic_training=training)
    modules = {"penzai": types.SimpleNamespace(), "penzai.toolshed": toolshed}
    with mock.patch.dict(sys.modules, modules):
        names = dict.fromkeys(["root_rng", "model", "loss_fn"])
        return run_snippets("penzai", **names).trainer


def kauldron():
    konfig = types.SimpleNamespace(imports=contextlib.nullcontext)
    schedules = {"learning_rate": optax.constant_schedule(0.1)}
    cfg = types.SimpleNamespace(ref=types.SimpleNamespace(schedules=schedules))
    with mock.patch.dict(
        sys.modules, {"kauldron": types.SimpleNamespace(konfig=konfig)}
    ):
        return run_snippets("kauldron", cfg=cfg).cfg.optimizer


OPTIMIZERS = {
    "maxtext": maxtext,
    "levanter": levanter,
    "easylm": lambda: run_easylm().optimizer,
    "gemma": lambda: run_snippets("gemma").optimizer,
    "nanodo": nanodo,
    "big_vision": big_vision,
    "purejaxrl": purejaxrl,
    "haiku": lambda: run_haiku().optimizer,
    "equinox": lambda: run_equinox().optimizer,
    "t5x": lambda: run_t5x().optimizer_def.optax_optimizer,
    "penzai": penzai,
    "kauldron": kauldron,
    "experts": lambda: run_snippets("experts").optimizer,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_statistics_are_those_of_the_matrices_that_kernels_are(name):
    memory = state_memory(OPTIMIZERS[name](), make_params(name))
    factored = {path: leaf for path, leaf in LEAVES[name].items() if "rows" in leaf}
    assert factored
    for found, axis in ((memory.rows, "rows"), (memory.cols, "columns")):
        assert found == {path: tuple(leaf[axis]) for path, leaf in factored.items()}


@pytest.mark.parametrize("name", ["maxtext", "levanter", "nanodo", "big_vision"])
def test_came_muon_takes_hidden_kernels_and_goes_downhill(name):
    tx, params = globals()[name]("came_muon"), make_params(name)
    groups = state_memory(tx, params).groups
    hidden = {path for path, group in groups.items() if group == "hidden"}
    kernels = {path for path, leaf in LEAVES[name].items() if "rows" in leaf}
    assert hidden == {k for k in kernels if not re.search("embedding|logits", k)}
    step, state, losses = jax.jit(make_step(tx)), tx.init(params), []
    for _ in range(3):
        params, state, loss = step(params, state)
        losses.append(loss)
    assert losses[2] < losses[1]


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


@pytest.mark.slow(but=2)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_trains(name):
    tx, params = OPTIMIZERS[name](), make_params(name)
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

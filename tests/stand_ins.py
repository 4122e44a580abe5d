"""Code bases that "In your code base" has snippets for, as far as these need them.

A stand-in has the leaves of `client_leaves.toml` and the code base's way of making an
optimizer, and nothing else: its loss is the distance of all parameters from 1.
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

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from flax import traverse_util
from flax.training.train_state import TrainState
from jax.sharding import PartitionSpec as P

from came_optax import steady_came

HERE = pathlib.Path(__file__).parent
PAGE = (HERE.parent / "docs" / "in-your-code-base.md").read_text(encoding="utf-8")
LEAVES = tomllib.loads((HERE / "client_leaves.toml").read_text(encoding="utf-8"))


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

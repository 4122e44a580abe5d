"""Snippets of "In your code base", each in a stand-in for that code base.

A stand-in has the parameter names, shapes and way of stepping of the real one, and
nothing else: its loss is the distance of all parameters from 1.
"""

import dataclasses
import functools
import json
import operator
import pathlib
import re
import sys
import types

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from came_optax import state_memory, state_sharding, steady_came

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "in-your-code-base.md"


@pytest.fixture(autouse=True)
def promotion():
    """As it is for a user: Optax promotes here and there."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def run_snippets(name, **names):
    """Runs the code under a heading of the page, among names that are there already."""
    text = PAGE.read_text(encoding="utf-8")
    section = re.search(rf"^\({name}\)=$.*?(?=^\(|\Z)", text, flags=re.M | re.S)
    snippets = re.findall(
        r"^```\{code-block\} python\n(.*?)^```$", section[0], flags=re.M | re.S
    )
    assert snippets
    for snippet in snippets:
        exec(snippet, names)
    return types.SimpleNamespace(**names)


def zeros(tree):
    return jax.tree.map(jnp.zeros, tree, is_leaf=lambda x: isinstance(x, tuple))


def distance(params, batch=1.0):
    leaves = jax.tree.leaves(params)
    return sum(jnp.mean((p - batch) ** 2) for p in leaves) / len(leaves)


def falls(step, carry, steps=30):
    """Steps, and says whether the loss that each step returns has fallen."""
    losses = []
    for _ in range(steps):
        *carry, loss = step(*carry)
        losses.append(float(loss))
    assert losses[-1] < 0.8 * losses[0], losses
    return carry


class Config(dict):
    """As ml_collections' ConfigDict."""

    __getattr__ = dict.__getitem__
    __setattr__ = dict.__setitem__


def axes_of(tx, params):
    """Returns the shapes of rows and columns."""
    memory = state_memory(tx, params)
    return {name: (rows, memory.cols[name]) for name, rows in memory.rows.items()}


@pytest.mark.slow
@pytest.mark.parametrize("mu_dtype", ["int8", jnp.dtype("int8"), "bfloat16"])
def test_maxtext(mu_dtype):
    d, layers, heads, head_dim, inner = 64, 4, 2, 32, 128
    params = zeros(
        {
            "params": {
                "token_embedder": {"embedding": (96, d)},
                "decoder": {
                    "layers": {
                        "self_attention": {
                            "query": {"kernel": (d, layers, heads, head_dim)},
                            "out": {"kernel": (heads, layers, head_dim, d)},
                        },
                        "mlp": {
                            "wi_0": {"kernel": (d, layers, inner)},
                            "wo": {"kernel": (inner, layers, d)},
                        },
                        "pre_self_attention_layer_norm": {"scale": (d, layers)},
                    },
                    "decoder_norm": {"scale": (d,)},
                    "logits_dense": {"kernel": (d, 96)},
                },
            }
        }
    )
    config = Config(
        opt_type="came", adam_weight_decay=0.1, mu_dtype=mu_dtype, param_scan_axis=1
    )
    schedule = optax.linear_schedule(0.0, 0.1, 5)
    tx = run_snippets("maxtext").get_optimizer(config, schedule)

    mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(AxisType.Auto,))
    place = jax.tree.map(lambda p: NamedSharding(mesh, P("fsdp")), params)
    place["params"]["decoder"]["layers"]["self_attention"]["out"]["kernel"] = (
        NamedSharding(mesh, P(None, None, "fsdp"))
    )
    params = jax.device_put(params, place)
    shardings = state_sharding(tx, params, place)
    state = jax.jit(tx.init, out_shardings=shardings)(params)

    @functools.partial(jax.jit, out_shardings=(place, shardings, None))
    def step(params, state):
        loss, grads = jax.value_and_grad(distance)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    falls(step, (params, state))
    axes = axes_of(tx, params)
    layer = "params/decoder/layers"
    assert axes[f"{layer}/mlp/wi_0/kernel"] == ((d, layers), (layers, inner))
    assert axes[f"{layer}/self_attention/query/kernel"] == (
        (d, layers),
        (layers, heads, head_dim),
    )
    assert f"{layer}/pre_self_attention_layer_norm/scale" not in axes
    assert axes["params/decoder/logits_dense/kernel"] == ((d,), (96,))


@pytest.fixture
def levanter(monkeypatch):
    """A module `levanter.optim` with the base class of its configurations."""

    @dataclasses.dataclass
    class OptimizerConfig:
        learning_rate: float = 0.1
        weight_decay: float = 0.0

        registered = {}  # noqa: RUF012

        @classmethod
        def register_subclass(cls, name):
            return lambda subclass: cls.registered.setdefault(name, subclass)

        def lr_scheduler(self, num_train_steps):
            return optax.linear_schedule(self.learning_rate, 0.01, num_train_steps)

        def build_weight_decay_mask(self):
            return lambda model: jax.tree.map(
                lambda x: True, model, is_leaf=lambda x: hasattr(x, "axes")
            )

    optim = types.SimpleNamespace(OptimizerConfig=OptimizerConfig)
    monkeypatch.setitem(sys.modules, "levanter", types.SimpleNamespace(optim=optim))
    monkeypatch.setitem(sys.modules, "levanter.optim", optim)
    return optim


@pytest.mark.slow
def test_levanter(levanter):
    hax = pytest.importorskip("haliax")
    run_snippets("levanter")
    config = levanter.OptimizerConfig.registered["came"](weight_decay=0.0)
    tx = config.build(100)
    layers, embed, mlp = hax.make_axes(layers=3, embed=64, mlp=128)
    model = {
        "embeddings": {"weight": hax.zeros(embed)},
        "transformer": {
            "layers": {
                "stacked": {
                    "mlp": {"up_proj": {"weight": hax.zeros((layers, embed, mlp))}},
                    "ln_1": {"weight": hax.zeros((layers, embed))},
                }
            }
        },
    }
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    mapping = {"embed": "data", "mlp": "model"}
    with jax.set_mesh(mesh), hax.axis_mapping(mapping):
        state = hax.named_jit(tx.init, out_axis_resources=mapping)(model)
        rows, cols = (
            optax.tree.get(state, name)["transformer"]["layers"]["stacked"]["mlp"]
            for name in ("v_row", "v_col")
        )
        rows, cols = rows["up_proj"]["weight"], cols["up_proj"]["weight"]
        assert rows.axes == (layers, embed)
        assert cols.axes == (layers, mlp)
        assert rows.array.sharding.spec == P(None, "data")

        @functools.partial(hax.named_jit, axis_resources=mapping)
        def step(model, state):
            loss, grads = jax.value_and_grad(distance)(model)
            updates, state = tx.update(grads, state, model)
            return optax.apply_updates(model, updates), state, loss

        falls(step, (model, state))


def match_partition_rules(rules, tree):
    """As EasyLM's: the first regular expression that matches a path; scalars whole."""

    def spec(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if leaf.size <= 1:
            return P()
        return next(spec for pattern, spec in rules if re.search(pattern, name))

    return jax.tree.map_with_path(spec, tree)


@pytest.mark.slow
def test_easylm():
    d, inner = 64, 128
    attention = {name: {"kernel": (d, d)} for name in ("wq", "wk", "wv", "wo")}
    mlp = {"w1": {"kernel": (d, inner)}, "w2": {"kernel": (inner, d)}}
    block = {
        "attention": attention,
        "feed_forward": mlp,
        "attention_norm": {"kernel": (d,)},
    }
    rules = (
        ("attention/(wq|wk|wv)/kernel", P("fsdp", "mp")),
        ("attention/wo/kernel", P("mp", "fsdp")),
        ("feed_forward/w1/kernel", P("fsdp", "mp")),
        ("feed_forward/w2/kernel", P("mp", "fsdp")),
        ("norm/kernel", P(None)),
        (".*", P(None)),
    )

    def create(optimizer):
        params = zeros({"transformer": {"h": {"0": block, "1": block}}})
        return TrainState.create(apply_fn=None, params=params, tx=optimizer)

    names = {
        "config": Config(clip_gradient=1.0, weight_decay=0.0, bf16_momentum=True),
        "learning_rate_schedule": optax.constant_schedule(0.1),
        "weight_decay_mask": None,
        "match_partition_rules": match_partition_rules,
        "partition_rules": rules,
    }
    chain = optax.chain(
        optax.clip_by_global_norm(1.0), steady_came(0.1, mu_dtype="bfloat16")
    )
    names["train_state_shapes"] = jax.eval_shape(lambda: create(chain))
    run = run_snippets("easylm", **names)
    mesh = jax.make_mesh((2, 4), ("fsdp", "mp"), axis_types=(AxisType.Auto,) * 2)

    def placed(partition):
        return jax.tree.map(
            lambda spec: NamedSharding(mesh, spec),
            partition,
            is_leaf=lambda x: isinstance(x, P),
        )

    shapes = jax.eval_shape(lambda: create(run.optimizer))
    partition = shapes.replace(
        **{
            name: getattr(run.train_state_partition, name)
            for name in ("step", "params", "opt_state")
        }
    )
    state = jax.jit(lambda: create(run.optimizer), out_shardings=placed(partition))()
    rows = optax.tree.get(state.opt_state, "v_row")["transformer"]["h"]["0"]
    assert rows["attention"]["wq"]["kernel"].sharding.spec == P("fsdp")

    naive = match_partition_rules(rules, shapes)
    with pytest.raises(ValueError, match="incompatible with its sharding annotation"):
        jax.jit(lambda: create(run.optimizer), out_shardings=placed(naive))()

    @jax.jit
    def step(state):
        loss, grads = jax.value_and_grad(distance)(state.params)
        return state.apply_gradients(grads=grads), loss

    falls(step, (state,))


@pytest.mark.slow
def test_gemma():
    heads, kv_heads, d, head_dim, inner = 4, 2, 64, 16, 96
    shapes = {
        "attn": {
            "q_einsum": {"w": (heads, d, head_dim)},
            "kv_einsum": {"w": (2, kv_heads, d, head_dim)},
            "attn_vec_einsum": {"w": (heads, head_dim, d)},
        },
        "mlp": {"gating_einsum": (2, d, inner), "linear": (inner, d)},
        "pre_attention_norm": {"scale": (d,)},
    }
    keys = iter(jax.random.split(jax.random.key(0), 10))
    params = {
        "transformer": {
            "layer_0": jax.tree.map(
                lambda shape: jax.random.normal(next(keys), shape),
                shapes,
                is_leaf=lambda x: isinstance(x, tuple),
            )
        }
    }
    tx = run_snippets("gemma").optimizer
    updates, _ = tx.update(params, tx.init(params), params)
    attn = params["transformer"]["layer_0"]["attn"]
    key, value = attn["kv_einsum"]["w"]
    matrices = {
        "query": jnp.moveaxis(attn["q_einsum"]["w"], 1, 0).reshape(d, -1),
        "key": jnp.moveaxis(key, 1, 0).reshape(d, -1),
        "value": jnp.moveaxis(value, 1, 0).reshape(d, -1),
        "out": attn["attn_vec_einsum"]["w"].reshape(-1, d),
    }
    plain = steady_came(1e-4)
    expected, _ = plain.update(matrices, plain.init(matrices), matrices)
    attn = updates["transformer"]["layer_0"]["attn"]
    key, value = attn["kv_einsum"]["w"]
    for ours, name in (
        (jnp.moveaxis(attn["q_einsum"]["w"], 1, 0), "query"),
        (jnp.moveaxis(key, 1, 0), "key"),
        (jnp.moveaxis(value, 1, 0), "value"),
        (attn["attn_vec_einsum"]["w"], "out"),
    ):
        x = ours.reshape(expected[name].shape)
        np.testing.assert_allclose(x, expected[name], rtol=1e-4, err_msg=name)
    assert axes_of(tx, params)["transformer/layer_0/mlp/gating_einsum"] == (
        (2, d),
        (2, inner),
    )


@pytest.mark.slow
def test_nanodo():
    d, heads = 64, 4
    dense = {"kernel": (d, heads, d // heads)}
    params = {
        "embed": {"embedding": (96, d)},
        "blocks_0": {
            "CausalAttn_0": {
                **{name: dense for name in ("query", "key", "value")},
                "attn_out_proj": {"kernel": (heads, d // heads, d)},
            },
            "Mlp_0": {"Dense_0": {"kernel": (d, 4 * d)}},
            "LayerNorm_0": {"scale": (d,)},
        },
    }
    c = Config(weight_decay=0.0, mu_dtype="int8")
    came_of = run_snippets("nanodo").came_of
    base = came_of(
        c, optax.constant_schedule(0.1), lambda p: jax.tree.map(lambda _: True, p)
    )
    tx = optax.MultiSteps(optax.chain(optax.clip_by_global_norm(1.0), base), 2)
    # Made inside of jit, as nanodo makes its sharded state.
    state = jax.jit(
        lambda: TrainState.create(apply_fn=None, params=zeros(params), tx=tx)
    )()

    @jax.jit
    def step(state):
        loss, grads = jax.value_and_grad(distance)(state.params)
        return state.apply_gradients(grads=grads), loss

    (state,) = falls(step, (state,), 60)
    assert state.opt_state.gradient_step == 30
    assert axes_of(tx, state.params)["blocks_0/CausalAttn_0/query/kernel"] == (
        (d,),
        (heads, d // heads),
    )


@pytest.mark.slow
def test_big_vision(monkeypatch):
    d, heads, depth = 64, 2, 3
    params = zeros(
        {
            "embedding": {"kernel": (8, 8, 3, d)},
            "Transformer": {
                "encoderblock": {
                    "MlpBlock_0": {"Dense_0": {"kernel": (depth, d, 4 * d)}},
                    "MultiHeadDotProductAttention_0": {
                        "query": {"kernel": (depth, d, heads, d // heads)}
                    },
                }
            },
            "head": {"bias": (10,)},
        }
    )
    monkeypatch.setattr(optax, "came", None, raising=False)  # Undoes the snippet's.
    config = Config(lr=0.1, wd=0.0, grad_clip_norm=1.0)
    run_snippets("big_vision", config=config)
    config = Config(json.loads(json.dumps(config)))
    scale = operator.attrgetter(config.optax_name)(optax)(**config.optax)
    tx = optax.chain(
        optax.masked(optax.clip_by_global_norm(config.grad_clip_norm), True),
        optax.masked(scale, jax.tree.map(lambda p: True, params)),
        optax.scale(config.lr),
        optax.scale_by_schedule(optax.constant_schedule(1.0)),
        optax.scale(-1.0),
    )

    @jax.jit
    def step(params, state):
        loss, grads = jax.value_and_grad(distance)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    falls(step, (params, jax.jit(tx.init)(params)))
    block = "Transformer/encoderblock"
    assert axes_of(tx, params)[
        f"{block}/MultiHeadDotProductAttention_0/query/kernel"
    ] == ((depth, d), (depth, heads, d // heads))
    steady = steady_came(0.1, mu_dtype="int8", factoring=config.optax["factoring"])
    grads = jax.tree.map(
        lambda p: jax.random.normal(jax.random.key(p.size), p.shape), params
    )
    ours, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    expected, _ = jax.jit(steady.update)(grads, steady.init(params), params)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7),
        ours,
        expected,
    )


@pytest.mark.slow(but=1)
@pytest.mark.parametrize("anneal", [True, False])
def test_purejaxrl(anneal):
    config = {"MAX_GRAD_NORM": 0.5, "LR": 0.1, "ANNEAL_LR": anneal}

    def linear_schedule(count):
        return config["LR"] * (1.0 - count / 60)

    def train(rng):
        params = {
            f"Dense_{i}": {
                "kernel": jax.random.normal(jax.random.fold_in(rng, i), (16, 16)),
                "bias": jnp.zeros(16),
            }
            for i in range(3)
        }
        tx = run_snippets(
            "purejaxrl", config=config, linear_schedule=linear_schedule
        ).tx
        state = TrainState.create(apply_fn=None, params=params, tx=tx)

        def update_minibatch(state, _):
            loss, grads = jax.value_and_grad(distance)(state.params)
            return state.apply_gradients(grads=grads), loss

        def update_epoch(state, _):
            return jax.lax.scan(update_minibatch, state, None, 5)

        return jax.lax.scan(update_epoch, state, None, 6)

    _, losses = jax.jit(jax.vmap(train))(jax.random.split(jax.random.key(0), 2))
    losses = losses.reshape(2, -1)
    assert (losses[:, -1] < 0.6 * losses[:, 0]).all()
    assert losses[0, 0] != losses[1, 0]


def test_haiku():
    stack = "transformer/__layer_stack_no_per_layer/linear"
    params = zeros(
        {
            stack: {"w": (4, 64, 128), "b": (4, 128)},
            "linear": {"w": (64, 10), "b": (10,)},
        }
    )
    run = run_snippets("haiku", jax=jax, params=params, loss_fn=distance)
    tx = run.optimizer
    assert axes_of(tx, params) == {
        f"{stack}/w": ((4, 64), (4, 128)),
        "linear/w": ((64,), (10,)),
    }
    new, _ = run.update(params, run.opt_state, 1.0)
    assert distance(new) < distance(params)


class EquinoxLayer(eqx.Module):
    linear: eqx.nn.Linear
    activation: object = jnp.tanh


class EquinoxModel(eqx.Module):
    layers: EquinoxLayer
    head: eqx.nn.Linear


@pytest.mark.slow
def test_equinox():
    @eqx.filter_vmap
    def make(key):
        return EquinoxLayer(eqx.nn.Linear(64, 64, key=key))

    keys = jax.random.split(jax.random.key(0), 5)
    model = EquinoxModel(make(keys[:4]), eqx.nn.Linear(64, 8, key=keys[4]))

    def loss_fn(model, batch):
        return distance(eqx.filter(model, eqx.is_inexact_array), batch)

    run = run_snippets("equinox", model=model, loss_fn=loss_fn)
    new, _ = run.update(model, run.opt_state, 1.0)
    assert loss_fn(new, 1.0) < loss_fn(model, 1.0)
    params = eqx.filter(model, eqx.is_inexact_array)
    assert axes_of(run.optimizer, params) == {
        "layers/linear/weight": ((4, 64), (4, 64)),
        "head/weight": ((8,), (64,)),
    }
    assert [x.shape for x in jax.tree.leaves(run.opt_state[0].v)][1] == (4, 64)


@pytest.mark.slow
def test_experts_are_updated_as_if_alone():
    experts = jax.random.normal(jax.random.key(0), (2, 4, 32, 48))
    params = {"layers": {"experts": {"wi": experts}}, "experts": {"wo": experts[0]}}
    names = {}
    page = PAGE.read_text(encoding="utf-8")
    section = page[page.index("## Mixtures of experts") :]
    exec(re.search(r"^```python\n(.*?)^```$", section, flags=re.M | re.S)[1], names)
    tx = names["optimizer"]
    # One expert of the second layer was chosen by no token for a while.
    idle = experts.at[1, 2].set(0)
    state = tx.init(params)
    for x in (*[idle] * 5, experts):
        grads = {"layers": {"experts": {"wi": x}}, "experts": {"wo": x[1]}}
        updates, state = tx.update(grads, state, params)
    update = updates["layers"]["experts"]["wi"][1, 2]
    assert jnp.sqrt(jnp.mean(update**2)) <= 1.0001e-3
    np.testing.assert_allclose(update, updates["experts"]["wo"][2], rtol=1e-5)
    alone = steady_came(1e-3)
    state = alone.init(experts[1, 2])
    for x in (*[idle] * 5, experts):
        expected, state = alone.update(x[1, 2], state, experts[1, 2])
    np.testing.assert_allclose(update, expected, rtol=1e-5)


def test_the_table_of_contents_names_each_section():
    text = PAGE.read_text(encoding="utf-8")
    anchors = re.findall(r"^\((\w+)\)=$", text, flags=re.M)
    assert re.findall(r"\| \[.*?\]\(#(\w+)\) \|", text) == anchors
    tests = {name.removeprefix("test_") for name in globals() if name[:5] == "test_"}
    assert set(anchors) <= tests

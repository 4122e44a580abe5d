"""came_muon: which leaves it takes for hidden matrices, and what it does to them."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from came_optax import (
    BalancedSplit,
    ByPath,
    Codes,
    FactoredAxes,
    LastTwoAxes,
    Stacked,
    came_muon,
    convert_state,
    orthogonalize,
    scale_by_came,
    state_memory,
    steady_came,
)


def normal(shapes, seed=0, dtype=jnp.float32):
    """Random arrays of the shapes in a dict, nested as their paths say."""
    rng, tree = np.random.default_rng(seed), {}
    for path, shape in shapes.items():
        *modules, leaf = path.split("/")
        node = tree
        for module in modules:
            node = node.setdefault(module, {})
        node[leaf] = jnp.asarray(rng.normal(size=shape), dtype)
    return tree


SHAPES = {
    "wte/embedding": (96, 64),
    "blocks/query/kernel": (64, 4, 16),
    "blocks/query/bias": (4, 16),
    "blocks/up/kernel": (64, 96),
    "blocks/up/bias": (96,),
    "blocks/ln_1/scale": (64,),
}
HIDDEN = {"blocks/query/kernel", "blocks/up/kernel"}


def hidden_leaves(tx, params):
    """The paths of what an optimizer takes for hidden matrices."""
    state = jax.eval_shape(tx.init, params)
    mu = optax.tree.get(state.inner_states["hidden"], "mu")
    paths = jax.tree.leaves_with_path(mu, is_leaf=lambda x: isinstance(x, Codes))
    return {jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in paths}


def steps(tx, params, count=3):
    """The updates of some steps on other gradients each."""
    state, all_updates = tx.init(params), []
    for seed in range(count):
        shapes = {
            jax.tree_util.keystr(path, simple=True, separator="/"): p.shape
            for path, p in jax.tree.leaves_with_path(params)
        }
        updates, state = jax.jit(tx.update)(normal(shapes, seed), state, params)
        all_updates.append(updates)
    return all_updates


@pytest.mark.parametrize(
    ("library", "hidden", "rest"),
    [
        (
            "Flax",
            "MultiHeadDotProductAttention_0/query/kernel MlpBlock_0/Dense_0/kernel "
            "attention/multi_head/out/kernel encoder/layer/0/output/dense/kernel "
            "decoder/layers_0/mlp/wi_0/kernel gate/kernel compose/kernel",
            "embedding/kernel posembed_input/pos_embedding head/kernel "
            "lm_head/kernel LMHead_0/Dense_0/kernel Embed_0/embedding logits/kernel "
            "q_norm/scale query_norm/weight scale pos_emb position/table "
            "relpos_bias/rel_embedding classifier/kernel wpe/w mask_token pe "
            "mlp/b_in",
        ),
        (
            "MaxText and Gemma",
            "decoder/layers/self_attention/query/kernel layer_0/mlp/linear "
            "layer_0/attn/attn_vec_einsum/w",
            "token_embedder/embedding decoder/logits_dense/kernel "
            "embedder/input_embedding",
        ),
        (
            "Haiku",
            "transformer/~/linear_1/w mlp/~/linear_0/w mlp/b_proj/w",
            "embed/embeddings linear/offset linear/b",
        ),
        (
            "Equinox and Levanter",
            "layers/0/attention/query_proj/weight transformer/layers/mlp/c_fc/weight",
            "token_embedding/weight position_embeddings/weight lm_head/weight",
        ),
        (
            "Hugging Face",
            "h/0/attn/c_attn/kernel bert/pooler/dense/kernel",
            "wte/embedding wpe/embedding score/kernel "
            "cls/predictions/transform/dense/kernel "
            "SelfAttention/relative_attention_bias/embedding",
        ),
    ],
)
def test_by_default_names_tell(library, hidden, rest):
    del library
    params = {name: jnp.zeros((8, 8)) for name in f"{hidden} {rest}".split()}
    assert hidden_leaves(came_muon(1e-2), params) == set(hidden.split())


def test_by_default_the_rule_tells():
    params = normal(
        {
            "vector": (8,),
            "scalar": (),
            "row": (1, 8),
            "cls/query": (1, 1, 8),
            "query": (8, 2, 4),
            "layers/kernel": (3, 8, 8),
            "layers/norm/scale": (3, 8),
            "layers/b": (3, 8),
            "einsum": (2, 8, 4),
            "table": (8, 8),
        }
    )
    rule = ByPath(
        {
            "layers": Stacked(BalancedSplit()),
            "einsum": FactoredAxes(row=(1,), col=(0, 2)),
            "table": FactoredAxes(),
        },
        default=BalancedSplit(),
    )
    chosen = hidden_leaves(came_muon(1e-2, factoring=rule), params)
    assert chosen == {"query", "layers/kernel", "einsum"}


@pytest.mark.parametrize(
    ("shapes", "rule", "leaf"),
    [
        ({"up": (3, 8, 8), "norm/scale": (3, 8)}, BalancedSplit(), "norm/scale"),
        ({"up": (8, 3, 8), "ln_1/scale": (8, 3)}, LastTwoAxes(), "ln_1/scale"),
        ({"up": (3, 8, 8), "rms/weight": (3, 8)}, BalancedSplit(), "rms/weight"),
        ({"experts/up": (4, 8, 16)}, BalancedSplit(), "experts/up"),
        ({"MoeBlock_0/wi": (4, 8, 16)}, BalancedSplit(), "MoeBlock_0/wi"),
    ],
)
def test_stacks_that_the_rule_does_not_know_are_refused(shapes, rule, leaf):
    with pytest.raises(ValueError, match=rf"leaf '{leaf}' .* seems to hold"):
        came_muon(1e-2, factoring=rule).init(normal(shapes))


def test_norms_of_heads_and_stacked_experts_are_not_refused():
    shapes = {"q_norm/scale": (4, 8), "key_norm/scale": (4, 8), "experts/up": (2, 8, 8)}
    rule = Stacked(BalancedSplit(), where="experts")
    chosen = hidden_leaves(came_muon(1e-2, factoring=rule), normal(shapes))
    assert chosen == {"experts/up"}


@pytest.mark.parametrize(
    "hidden",
    [
        None,
        r"blocks/\w+/kernel",
        {
            "wte": False,
            "blocks": {
                "query": {"kernel": True, "bias": False},
                "up": {"kernel": True, "bias": False},
                "ln_1": False,
            },
        },
        lambda params: jax.tree.map_with_path(
            lambda path, _: path[-1].key == "kernel", params
        ),
    ],
    ids=["default", "regex", "mask", "function"],
)
def test_hidden_leaves_can_be_named(hidden):
    tx = came_muon(1e-2, hidden=hidden)
    assert hidden_leaves(tx, normal(SHAPES)) == HIDDEN


@pytest.mark.parametrize(
    ("hidden", "message"),
    [
        ("mlp", r"hidden='mlp' names none of the leaves \['blocks/ln_1/scale', "),
        (False, "hidden=False names none of the leaves"),
        (lambda params: jax.tree.map(lambda _: False, params), "names none"),
        ("blocks", r"hidden='blocks' names leaf 'blocks/ln_1/scale' of shape \(64,\)"),
        ({"wte": True, "other": False}, "hidden does not fit the parameters"),
    ],
)
def test_a_choice_that_cannot_be_meant_is_refused(hidden, message):
    tx, params = came_muon(1e-2, hidden=hidden), normal(SHAPES)
    with pytest.raises(ValueError, match=message):
        tx.init(params)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden": "("}, "hidden must be a regular expression"),
        ({"rest_learning_rate_scale": -1.0}, "rest_learning_rate_scale must be >= 0"),
        ({"b1": 1.0}, "b1 must be"),
        ({"ns_coeffs": "fast"}, "ns_coeffs must be"),
        # What optax.inject_hyperparams makes of jnp.bfloat16, which can be called.
        ({"dtype": jnp.bfloat16(0)}, "dtype must be a real floating dtype or None"),
    ],
)
def test_arguments_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        came_muon(1e-2, **options)


def test_a_model_without_hidden_matrices_is_refused():
    with pytest.raises(ValueError, match=r"hidden=None names none .* \['wte'\]"):
        came_muon(1e-2).init({"wte": jnp.ones((4, 4))})


def test_no_parameters_are_no_error():
    tx = came_muon(1e-2)
    assert tx.update({}, tx.init({}), {})[0] == {}


def test_the_choice_is_in_the_table_of_leaves():
    memory = state_memory(came_muon(1e-2), normal(SHAPES))
    chosen = {leaf for leaf, group in memory.groups.items() if group == "hidden"}
    assert chosen == HIDDEN
    assert memory.groups.keys() == SHAPES.keys()
    table = memory.by_leaf_table()
    assert re.search(r"blocks/query/kernel +hidden +64×4×16 +64 +4×16 ", table)
    assert re.search(r"wte/embedding +rest +96×64 ", table)
    unlabelled = state_memory(steady_came(1e-2), normal(SHAPES)).by_leaf_table()
    assert "group" not in unlabelled


@pytest.mark.parametrize("mu_dtype", ["float32", "int8"])
def test_hidden_matrices_are_orthogonalised_and_the_rest_is_steady_came(mu_dtype):
    params = normal(SHAPES)
    mask = jax.tree.map(lambda p: p.ndim > 1, params)
    options = {"factoring": BalancedSplit(2), "mu_dtype": mu_dtype}
    tx = came_muon(
        optax.linear_schedule(1e-2, 2e-2, 2),
        weight_decay=0.1,
        weight_decay_mask=mask,
        rest_learning_rate_scale=0.5,
        **options,
    )
    hidden = optax.chain(
        scale_by_came(
            b1=0.95, b2=0.95, eps2=0.1, nesterov=True, bias_correction=True, **options
        ),
        orthogonalize(),
        optax.add_decayed_weights(0.1),
        optax.scale_by_learning_rate(optax.linear_schedule(1e-2, 2e-2, 2)),
    )
    rest = steady_came(
        optax.linear_schedule(5e-3, 1e-2, 2),
        weight_decay=0.1,
        weight_decay_mask=mask,
        **options,
    )
    names = jax.tree.map_with_path(
        lambda path, _: path[0].key == "blocks" and path[-1].key == "kernel", params
    )
    for updates, of_hidden, of_rest in zip(
        steps(tx, params),
        steps(optax.masked(hidden, names), params),
        steps(rest, params),
        strict=True,
    ):
        expected = jax.tree.map(jnp.where, names, of_hidden, of_rest)
        chex.assert_trees_all_close(updates, expected, rtol=1e-4, atol=1e-6)


def test_a_rate_that_is_a_number_is_scaled_for_the_rest_alone():
    params = normal({"wte": (8, 4), "up": (8, 4)})
    (whole,), (half,) = (
        steps(came_muon(1e-2, rest_learning_rate_scale=scale), params, 1)
        for scale in (1.0, 0.5)
    )
    chex.assert_trees_all_close(half["wte"], 0.5 * whole["wte"], rtol=1e-6)
    chex.assert_trees_all_equal(half["up"], whole["up"])


def test_a_stack_is_updated_as_its_layers():
    shapes = {"query/kernel": (64, 4, 16), "up/kernel": (64, 96), "norm/scale": (64,)}
    stacked = normal({f"layers/{k}": (3, *shape) for k, shape in shapes.items()})
    layers = [jax.tree.map(lambda x, i=i: x[i], stacked["layers"]) for i in range(3)]
    tx, of_stack = came_muon(1e-2), came_muon(1e-2, factoring=Stacked(BalancedSplit()))
    updates, _ = jax.jit(tx.update)(layers, tx.init(layers), layers)
    of_stack_updates, _ = jax.jit(of_stack.update)(
        stacked, of_stack.init(stacked), stacked
    )
    expected = {"layers": jax.tree.map(lambda *x: jnp.stack(x), *updates)}
    chex.assert_trees_all_close(of_stack_updates, expected, rtol=1e-3, atol=1e-6)


def test_updates_have_the_dtype_of_the_parameters():
    params = normal(SHAPES, dtype=jnp.bfloat16)
    tx = came_muon(1e-2, weight_decay=0.1)
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)


@pytest.mark.parametrize(
    "options",
    [
        {"learning_rate": 1e-2},
        {
            "learning_rate": 1e-2,
            "weight_decay": 0.1,
            "hidden": "kernel",
            "mu_dtype": None,
            "consistent_rms": None,
            "ns_coeffs": "polar_express",
            "factoring": LastTwoAxes(),
        },
    ],
)
def test_injected_hyperparams_give_the_plain_updates(options):
    params = normal(SHAPES)
    for updates, same in zip(
        steps(came_muon(**options), params),
        steps(optax.inject_hyperparams(came_muon)(**options), params),
        strict=True,
    ):
        chex.assert_trees_all_close(updates, same, rtol=1e-3, atol=1e-6)


def test_inside_masked_and_chain_and_partition():
    params = normal(SHAPES)
    tx = came_muon(1e-2, weight_decay=0.1)
    kept = {"blocks": {"up": params["blocks"]["up"]}}
    expected, _ = jax.jit(tx.update)(kept, tx.init(kept), kept)
    labels = {
        "wte": "frozen",
        "blocks": {"query": "frozen", "up": "ours", "ln_1": "frozen"},
    }
    wrapped = optax.chain(
        optax.clip_by_global_norm(1e9),
        optax.partition({"ours": tx, "frozen": optax.set_to_zero()}, labels),
    )
    updates, _ = jax.jit(wrapped.update)(params, wrapped.init(params), params)
    chex.assert_trees_all_close(updates["blocks"]["up"], expected["blocks"]["up"])
    assert not updates["wte"]["embedding"].any()


def test_multi_steps_is_one_step_on_the_mean():
    params, tx = normal(SHAPES), came_muon(1e-2)
    accumulating = optax.MultiSteps(tx, every_k_schedule=2)
    state = accumulating.init(params)
    with jax.numpy_dtype_promotion("standard"):
        for factor in (1.0, 3.0):
            grads = jax.tree.map(lambda p, f=factor: f * p, params)
            updates, state = jax.jit(accumulating.update)(grads, state, params)
    mean = jax.tree.map(lambda p: 2 * p, params)
    expected, _ = jax.jit(tx.update)(mean, tx.init(params), params)
    chex.assert_trees_all_close(updates, expected, rtol=1e-4, atol=1e-6)


def test_it_learns():
    params = normal({"embed": (64, 16), "up/kernel": (16, 64), "down/kernel": (64, 16)})
    params = jax.tree.map(lambda p: 0.1 * p, params)
    tokens = jnp.arange(64)

    def loss_fn(params):
        x = params["embed"][tokens]
        x = jax.nn.relu(x @ params["up"]["kernel"]) @ params["down"]["kernel"]
        logits = x @ params["embed"].T
        labels = jnp.roll(tokens, 1)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    tx = came_muon(2e-2)
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    losses = []
    for _ in range(60):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    assert losses[0] > 4
    assert losses[-1] < 1


TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 64, (40, 64)))


def trained(tx, params, state, steps):
    """Parameters, state and losses after steps on other tokens each."""

    def loss_fn(params, tokens):
        x = params["embed"][tokens]
        x = x + jax.nn.relu(x @ params["up"]["kernel"]) @ params["down"]["kernel"]
        labels = 3 * tokens % 64
        logits = x @ params["head"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def step(params, state, tokens):
        loss, grads = jax.value_and_grad(loss_fn)(params, tokens)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    losses = []
    for i in steps:
        params, state, loss = step(params, state, TOKENS[i])
        losses.append(float(loss))
    return params, state, losses


MUON = optax.contrib.muon(
    1e-2,
    consistent_rms=0.2,
    muon_weight_dimension_numbers=lambda params: {
        name: optax.contrib.MuonDimensionNumbers() if name in ("up", "down") else None
        for name in params
    },
)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (optax.adamw(1e-2), came_muon(1e-2)),
        (MUON, came_muon(1e-2)),
        (came_muon(1e-2, mu_dtype="float32"), came_muon(1e-2, mu_dtype="int8")),
        (came_muon(1e-2, mu_dtype="int8"), came_muon(1e-2, mu_dtype="int4")),
        (came_muon(1e-2), optax.adamw(1e-2)),
    ],
    ids=["AdamW", "Muon", "int8", "int4", "to AdamW"],
)
def test_a_running_job_goes_on_with_another_state(old, new):
    shapes = {"embed": (64, 64), "up/kernel": (64, 72), "down/kernel": (72, 64)}
    params = jax.tree.map(lambda p: 0.1 * p, normal({**shapes, "head": (64, 64)}))
    with jax.numpy_dtype_promotion("standard"):
        params, state, before = trained(old, params, old.init(params), range(20))
        state = convert_state(state, params, old=old, new=new)
        chex.assert_trees_all_equal_shapes_and_dtypes(state, new.init(params))
        _, _, after = trained(new, params, state, range(20, 40))
    assert np.mean(before[-3:]) < 0.8 * before[0]  # It was learning,
    assert max(after) < 1.05 * np.mean(before[-3:])  # does not fall back
    assert after[-1] < 0.8 * after[0]  # and goes on.


def test_converted_momentum_has_muons_direction():
    params, new = normal({"up": (64, 72), "b": (64,)}), came_muon(1e-2, mu_dtype=None)
    with jax.numpy_dtype_promotion("standard"):
        state = jax.jit(MUON.update)(params, MUON.init(params), params)[1]
        converted = convert_state(state, params, old=MUON, new=new)
    mu = optax.tree.get(state.inner_states["muon"], "mu")["up"]
    converted_mu = optax.tree.get(converted.inner_states["hidden"], "mu")["up"]
    expected = mu / jnp.sqrt(39 * jnp.mean(mu**2))
    chex.assert_trees_all_close(converted_mu, expected, rtol=1e-5)

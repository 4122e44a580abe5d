"""came_muon: which leaves it takes for hidden matrices, and what it does to them."""

import re

import chex
import equinox as eqx
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
    orthogonalize,
    quantized_ema,
    scale_by_factored_moment,
    state_memory,
    steady_came,
)
from tests.draws import normal_tree

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
        rng = np.random.default_rng(seed)
        grads = jax.tree.map(
            lambda p, r=rng: jnp.float32(r.normal(size=p.shape)), params
        )
        updates, state = jax.jit(tx.update)(grads, state, params)
        all_updates.append(updates)
    return all_updates


@pytest.mark.parametrize(
    ("hidden", "rest"),
    [
        (
            "MultiHeadDotProductAttention_0/query/kernel MlpBlock_0/Dense_0/kernel "
            "attention/multi_head/out/kernel encoder/layer/0/output/dense/kernel "
            "decoder/layers_0/mlp/wi_0/kernel gate/kernel compose/kernel "
            "PositionWiseFFN_0/Dense_0/kernel layer/pos_ffn/w_1/kernel "
            "positionwise_feed_forward/kernel position_ff/kernel "
            "MultiHeadAttention_0/Head_0/Dense_0/kernel attn/head_1/key/kernel",
            "embedding/kernel posembed_input/pos_embedding head/kernel "
            "lm_head/kernel LMHead_0/Dense_0/kernel Embed_0/embedding logits/kernel "
            "q_norm/scale query_norm/weight scale pos_emb position/table "
            "relpos_bias/rel_embedding classifier/kernel wpe/w mask_token pe "
            "readout/kernel mlp/b_in",
        ),
        (
            "decoder/layers/self_attention/query/kernel layer_0/mlp/linear "
            "layer_0/attn/attn_vec_einsum/w",
            "token_embedder/embedding decoder/logits_dense/kernel "
            "embedder/input_embedding",
        ),
        (
            "transformer/~/linear_1/w mlp/~/linear_0/w mlp/b_proj/w",
            "embed/embeddings linear/offset linear/b",
        ),
        (
            "layers/0/attention/query_proj/weight transformer/layers/mlp/c_fc/weight",
            "token_embedding/weight position_embeddings/weight lm_head/weight",
        ),
        (
            "h/0/attn/c_attn/kernel bert/pooler/dense/kernel",
            "wte/embedding wpe/embedding score/kernel "
            "cls/predictions/transform/dense/kernel "
            "SelfAttention/relative_attention_bias/embedding",
        ),
    ],
    ids=["Flax", "MaxText and Gemma", "Haiku", "Equinox and Levanter", "Hugging Face"],
)
def test_by_default_names_tell(hidden, rest):
    params = {name: jnp.zeros((8, 8)) for name in f"{hidden} {rest}".split()}
    assert hidden_leaves(came_muon(1e-2), params) == set(hidden.split())


def test_by_default_the_rule_tells():
    rule = {
        "layers": Stacked(BalancedSplit()),
        "experts": Stacked(BalancedSplit()),
        "einsum": FactoredAxes(row=(1,), col=(0, 2)),
        "table": FactoredAxes(),
    }
    hidden = {"query": (8, 2, 4), "einsum": (2, 8, 4)}
    hidden |= {"layers/kernel": (3, 8, 8), "experts/up": (2, 8, 8)}
    rest = {"vector": (8,), "scalar": (), "row": (1, 8), "cls/query": (1, 1, 8)}
    rest |= {"layers/norm/scale": (3, 8), "layers/b": (3, 8), "table": (8, 8)}
    rest |= {"q_norm/scale": (4, 8), "key_norm/scale": (4, 8)}
    rest |= {"norm1/linear/kernel": (8, 48)}  # Of a norm that is told how to scale.
    tx = came_muon(1e-2, factoring=ByPath(rule, default=BalancedSplit()))
    assert hidden_leaves(tx, normal_tree(hidden | rest)) == hidden.keys()


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
        came_muon(1e-2, factoring=rule).init(normal_tree(shapes))


MASK = {
    "wte": False,
    "blocks": {
        "query": {"kernel": True, "bias": False},
        "up": {"kernel": True, "bias": False},
        "ln_1": False,
    },
}


@pytest.mark.parametrize(
    "hidden",
    [None, r"blocks/\w+/kernel", MASK, lambda _: MASK],
    ids=["default", "regex", "mask", "function"],
)
def test_hidden_leaves_can_be_named(hidden):
    tx = came_muon(1e-2, hidden=hidden)
    assert hidden_leaves(tx, normal_tree(SHAPES)) == HIDDEN


def test_hidden_leaves_may_be_named_by_a_module():
    """Equinox's can be called, but are trees."""
    mlp = eqx.filter(eqx.nn.MLP(8, 8, 8, 2, key=jax.random.key(0)), eqx.is_array)
    mask = jax.tree.map(lambda p: p.ndim > 1, mlp)
    names = {f"layers/{i}/weight" for i in range(3)}
    assert hidden_leaves(came_muon(1e-2, hidden=mask), mlp) == names


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"hidden": "mlp"},
            r"='mlp' names none of the leaves 'blocks/ln_1/s.* \d more",
        ),
        ({"hidden": False}, "hidden=False names none of the leaves"),
        ({"hidden": lambda p: jax.tree.map(lambda _: False, p)}, "names none"),
        ({"hidden": "blocks"}, r"names leaf 'blocks/ln_1/scale' of shape \(64,\)"),
        ({"hidden": {"wte": True, "other": False}}, "hidden does not fit"),
        ({"hidden": "("}, "hidden must be a regular expression"),
        (
            {"factoring": LastTwoAxes(100)},
            "none of the leaves .* is a hidden matrix by",
        ),
        ({"rest_learning_rate_scale": -1.0}, "rest_learning_rate_scale must be >= 0"),
        ({"b1": 1.0}, "b1 must be"),
        ({"b2": 1.0}, "b2 must be"),
        ({"consistent_rms": 0.0}, "consistent_rms must be"),
        ({"ns_coeffs": "fast"}, "ns_coeffs must be"),
        # What optax.inject_hyperparams makes of jnp.bfloat16, which can be called.
        (
            {"ns_dtype": jnp.bfloat16(0)},
            "^dtype must be a real floating dtype or None.*name",
        ),
        ({"ns_dtype": "bf16"}, "^dtype must be a real .*ns_dtype.*got 'bf16'"),
        ({"mu_dtype": jnp.bfloat16(0)}, "mu_dtype must be one of .* give its name"),
    ],
)
def test_what_cannot_be_meant_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        came_muon(1e-2, **options).init(normal_tree(SHAPES))


def test_no_parameters_are_no_error():
    tx = came_muon(1e-2)
    assert tx.update({}, tx.init({}), {})[0] == {}


def test_the_choice_is_in_the_table_of_leaves():
    memory = state_memory(came_muon(1e-2), normal_tree(SHAPES))
    chosen = {leaf for leaf, group in memory.groups.items() if group == "hidden"}
    assert chosen == HIDDEN
    assert memory.groups.keys() == SHAPES.keys()
    table = memory.by_leaf_table()
    assert re.search(r"blocks/query/kernel +hidden +64×4×16 +64 +4×16 ", table)
    assert re.search(r"wte/embedding +rest +96×64 ", table)
    unlabelled = state_memory(steady_came(1e-2), normal_tree(SHAPES)).by_leaf_table()
    assert "group" not in unlabelled


@pytest.mark.slow(but=1)
@pytest.mark.parametrize(
    ("scheduled", "mu_dtype"), [(True, "float32"), (False, "int8")]
)
def test_hidden_matrices_are_orthogonalised_and_the_rest_is_steady_came(
    scheduled, mu_dtype
):
    params = normal_tree(SHAPES)
    mask = jax.tree.map(lambda p: p.ndim > 1, params)
    options = {"factoring": BalancedSplit(2), "mu_dtype": mu_dtype}
    decay = {"weight_decay": 0.1, "weight_decay_mask": mask}

    def rate(scale):
        first = 1e-2 * scale
        return optax.linear_schedule(first, 2 * first, 2) if scheduled else first

    tx = came_muon(rate(1), rest_learning_rate_scale=0.5, **decay, **options)
    to_rms = optax.stateless(
        lambda updates, _: jax.tree.map(
            lambda u: 0.2 * u / jnp.sqrt(jnp.mean(u**2)), updates
        )
    )
    hidden = optax.chain(
        quantized_ema(0.95, nesterov=True, debias=True, **options),
        orthogonalize(),
        scale_by_factored_moment(0.95, factoring=options["factoring"]),
        to_rms,
        optax.add_decayed_weights(0.1),
        optax.scale_by_learning_rate(rate(1)),
    )
    rest = steady_came(rate(0.5), **decay, **options)
    names = jax.tree.map_with_path(
        lambda path, _: path[0].key == "blocks" and path[-1].key == "kernel", params
    )
    each = tx, optax.masked(hidden, names), rest
    for updates, *parts in zip(*(steps(tx, params) for tx in each), strict=True):
        expected = jax.tree.map(jnp.where, names, *parts)
        chex.assert_trees_all_close(updates, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("consistent_rms", "expected"), [(0.2, 0.2), (None, 1 / np.sqrt(8))]
)
def test_each_matrix_moves_by_one_size(consistent_rms, expected):
    """Whatever its gradients are, and not at all if they are zero."""
    params = normal_tree({"up": (3, 8, 4), "query": (8, 2, 4)})
    grads = dict(params)
    grads["up"] *= jnp.array([1.0, 1e-3, 0.0])[:, None, None]
    rule = ByPath({"up": LastTwoAxes()}, default=BalancedSplit())
    tx = came_muon(1.0, factoring=rule, consistent_rms=consistent_rms)
    state = tx.init(params)
    for _ in range(2):
        updates, state = jax.jit(tx.update)(grads, state, params)
        rms = jnp.sqrt(jnp.mean(updates["up"] ** 2, (1, 2)))
        np.testing.assert_allclose(rms, [expected, expected, 0], rtol=1e-5)
        rms = jnp.sqrt(jnp.mean(updates["query"] ** 2))
        np.testing.assert_allclose(rms, expected, rtol=1e-5)


@pytest.mark.slow
def test_a_stack_is_updated_as_its_layers():
    shapes = {"query/kernel": (64, 4, 16), "up/kernel": (64, 96), "norm/scale": (64,)}
    stacked = normal_tree({f"layers/{k}": (3, *shape) for k, shape in shapes.items()})
    layers = [jax.tree.map(lambda x, i=i: x[i], stacked["layers"]) for i in range(3)]
    tx, of_stack = came_muon(1e-2), came_muon(1e-2, factoring=Stacked(BalancedSplit()))
    updates, _ = jax.jit(tx.update)(layers, tx.init(layers), layers)
    of_stack_updates, _ = jax.jit(of_stack.update)(
        stacked, of_stack.init(stacked), stacked
    )
    expected = {"layers": jax.tree.map(lambda *x: jnp.stack(x), *updates)}
    chex.assert_trees_all_close(of_stack_updates, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.complex64])
def test_updates_have_the_dtype_of_the_parameters(dtype):
    params = normal_tree(SHAPES, dtype=dtype)
    tx = came_muon(1e-2, weight_decay=0.1)
    state = jax.eval_shape(tx.init, params)
    with jax.numpy_dtype_promotion("standard"):  # For optax's decay of complex leaves.
        updates, new = jax.eval_shape(tx.update, params, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(new, state)


OTHERS = {"ns_coeffs": "polar_express", "factoring": LastTwoAxes(), "hidden": "kernel"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{}, {"weight_decay": 0.1, "mu_dtype": None, "consistent_rms": None, **OTHERS}],
)
def test_injected_hyperparams_give_the_plain_updates(options):
    params = normal_tree(SHAPES)
    makes = came_muon, optax.inject_hyperparams(came_muon)
    for updates, same in zip(
        *(steps(make(learning_rate=1e-2, **options), params) for make in makes),
        strict=True,
    ):
        chex.assert_trees_all_close(updates, same, rtol=1e-3, atol=1e-6)


def test_injected_coefficients_are_refused_by_name():
    params = normal_tree(SHAPES)
    tx = optax.inject_hyperparams(came_muon)(1e-2, ns_coeffs=np.ones(3))
    state = tx.init(params)
    with pytest.raises(ValueError, match=r"ns_coeffs must be .*traces arrays: give tu"):
        jax.eval_shape(tx.update, params, state, params)


@pytest.mark.slow
def test_inside_chain_and_partition():
    params, tx = normal_tree(SHAPES), came_muon(1e-2, weight_decay=0.1)
    kept = {"blocks": {"up": params["blocks"]["up"]}}
    expected, _ = jax.jit(tx.update)(kept, tx.init(kept), kept)
    labels = {"query": "frozen", "up": "ours", "ln_1": "frozen"}
    parts = {"ours": tx, "frozen": optax.set_to_zero()}
    wrapped = optax.chain(
        optax.clip_by_global_norm(1e9),
        optax.partition(parts, {"wte": "frozen", "blocks": labels}),
    )
    updates, _ = jax.jit(wrapped.update)(params, wrapped.init(params), params)
    chex.assert_trees_all_close(updates["blocks"]["up"], expected["blocks"]["up"])
    assert not updates["wte"]["embedding"].any()

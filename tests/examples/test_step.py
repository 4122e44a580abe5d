"""Training and evaluation steps on mock data, over eight devices."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from came_optax import LastTwoAxes, Stacked, came, came_muon, steady_came
from models import gpt2
from task import Mean, Task, UserError, with_param_dtype
from tasks.gpt2 import next_token_loss
from tests.examples import stepping
from training import sharding, step
from training.optimizers import (
    OptimizerOptions,
    decay_mask,
    make_optimizer,
    make_schedule,
)

CONFIG = gpt2.GPT2Config(vocab_size=13, n_positions=8, n_embd=12, n_layer=1, n_head=3)
TASK = Task(
    name="mock",
    make_model=lambda rngs: gpt2.GPT2(CONFIG, rngs=rngs),
    loss_fn=next_token_loss,
    train=[],
    validation=[],
    tokens_per_record=8,
)
BATCH = {
    "tokens": np.random.default_rng(0).integers(13, size=(16, 9), dtype=np.int32),
    "weight": np.ones(16, np.float32),
}


pytestmark = pytest.mark.usefixtures("promotion")


def train(tx, steps, accumulate=1, task=TASK, batch=BATCH):
    return stepping.train(task, tx, batch, sharding.make_mesh(), steps, accumulate)


@pytest.mark.parametrize(
    ("optimizer", "dtype"),
    [
        ("steady-came", "float32"),
        ("came-muon", "bfloat16"),
        ("adamw", "float32"),
        ("adafactor", "float32"),
    ],
)
def test_loss_falls(optimizer, dtype):
    options = OptimizerOptions(optimizer=optimizer, learning_rate=2e-3, warmup=0)
    tx = make_optimizer(options, make_schedule(options, 10), dtype)
    state, losses = train(tx, 5, task=with_param_dtype(TASK, dtype))
    remainder = optax.tree.get(state.opt_state, "remainder")
    assert (remainder is None) == (dtype == "float32")
    assert losses[0] == pytest.approx(np.log(13), rel=0.02)
    assert losses[-1] < losses[0] - 0.01
    assert state.step == 5
    chex.assert_tree_all_finite(state.params)
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state))


def test_pretrained_parameters_keep_the_dtype_and_the_devices_of_the_first():
    task = dataclasses.replace(
        with_param_dtype(TASK, "bfloat16"),
        pretrained=lambda params: jax.tree.map(np.float32, params),
    )
    init = step.make_init(task, optax.sgd(1.0), sharding.make_mesh())
    params, expected = step.first_state(task, init, 0).params, init(0).params
    chex.assert_trees_all_equal(params, expected)
    chex.assert_trees_all_equal_shapes_and_dtypes(params, expected)
    for p, q in zip(*map(jax.tree.leaves, (params, expected)), strict=True):
        assert p.sharding == q.sharding


def test_accumulation_changes_nothing_but_rounding():
    whole, losses = train(optax.sgd(1.0), 1)
    parts, part_losses = train(optax.sgd(1.0), 1, accumulate=2)
    assert losses == pytest.approx(part_losses, rel=1e-6)
    chex.assert_trees_all_close(whole.params, parts.params, atol=1e-6)


def test_gradients_of_many_parts_are_added_up_in_float32():
    def loss_fn(model, batch, rngs):
        losses = jnp.square(model(batch["x"])).sum(-1) * batch["weight"]
        return {"loss": Mean(losses.sum(), batch["weight"].sum())}

    task = dataclasses.replace(
        TASK, make_model=lambda rngs: nnx.Linear(32, 32, rngs=rngs), loss_fn=loss_fn
    )
    x = np.random.default_rng(0).normal(size=(512, 32)).astype(np.float32)
    batch, gradients = {"x": x, "weight": np.ones(512, np.float32)}, []
    for dtype, parts in ("float32", 1), ("bfloat16", 64):
        of_dtype = with_param_dtype(task, dtype)
        state, _ = train(optax.trace(0.0), 1, parts, of_dtype, batch)
        kernel = optax.tree.get(state.opt_state, "trace")["kernel"]
        gradients.append(np.asarray(kernel[...], np.float64))
    exact, parts = gradients
    assert np.sqrt(np.mean((parts - exact) ** 2) / np.mean(exact**2)) < 3e-3


def test_evaluation_leaves_padding_out():
    mesh = sharding.make_mesh()
    params = step.make_init(TASK, optax.identity(), mesh)(0).params
    padded = {
        "tokens": np.concatenate([BATCH["tokens"][:11], np.zeros((5, 9), np.int32)]),
        "weight": np.repeat([1, 0], [11, 5]).astype(np.float32),
    }
    mean = step.make_evaluate(TASK, mesh)(params, [padded])["loss"]
    alone = {name: array[:11] for name, array in BATCH.items()}
    expected = nnx.jit(next_token_loss)(step.merge(TASK, params), alone)["loss"]
    assert expected.count == 11 * 8
    assert mean == pytest.approx(float(expected.total / expected.count), rel=1e-5)


def test_kernels_alone_are_decayed():
    params = step.state_shapes(TASK, optax.identity(), sharding.make_mesh()).params
    mask = nnx.to_flat_state(decay_mask(params))
    decayed = {path[-1] for path, leaf in mask if leaf.get_raw_value()}
    spared = {path[-1] for path, leaf in mask if not leaf.get_raw_value()}
    assert decayed == {"kernel"}
    assert spared == {"bias", "scale", "embedding"}


def test_batches_must_split_evenly():
    mesh = sharding.make_mesh()
    sharding.check_batch_size(32, 4, mesh)
    for batch_size, accumulate in (12, 1), (16, 4):
        with pytest.raises(UserError, match="--batch-size"):
            sharding.check_batch_size(batch_size, accumulate, mesh)


OTHERS = {"bias_correction": False, "b2": 0.5}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"optimizer": "steady-came"}, steady_came(1e-2)),
        ({"optimizer": "came"}, came(1e-2)),
        (
            {"update_clipping_threshold": 0, **OTHERS},
            steady_came(1e-2, update_clipping_threshold=None, **OTHERS),
        ),
        ({"optimizer": "came-muon", "b1": 0.9}, came_muon(1e-2, b1=0.9)),
        ({"optimizer": "nadamw"}, optax.nadamw(1e-2, b2=0.95, weight_decay=0)),
    ],
    ids=["steady-came", "came", "overridden", "came-muon", "nadamw"],
)
def test_update_rules_have_their_own_defaults(options, expected):
    options = OptimizerOptions(**options, weight_decay=0, clip_norm=1e9)
    tx = make_optimizer(options, lambda count: 1e-2)
    params = {"kernel": np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)}

    def three_steps(tx):
        state, updates = tx.init(params), []
        for scale in (1.0, -0.5, 2.0):
            grads = {"kernel": scale * params["kernel"]}
            update, state = tx.update(grads, state, params)
            updates.append(update["kernel"])
        return updates

    chex.assert_trees_all_close(three_steps(tx), three_steps(expected), rtol=1e-6)


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        ("adamw", {"mu_dtype": "int8"}),
        ("nadamw", {"nesterov": False}),
        ("lion", {"b3": 0.5}),
        ("adafactor", {"b2": 0.9}),
        ("muon", {"b2": 0.9}),
        ("came-muon", {"update_clipping_threshold": 1.0}),
        ("came-muon", {"b3": 0.5}),
        ("came-muon", {"bias_correction": True}),
    ],
)
def test_an_option_that_a_rule_has_not_is_refused(optimizer, options):
    options = OptimizerOptions(optimizer=optimizer, **options)
    with pytest.raises(UserError, match=optimizer):
        make_optimizer(options, lambda count: 1e-2)


@pytest.mark.parametrize(
    ("name", "factoring", "message"),
    [
        ("steady-came", Stacked(axis=2), r"axis=2.: leaf 'kernel' of shape \(4, 4\)"),
        ("came-muon", LastTwoAxes(4096), "none of the leaves 'kernel' is a hidden"),
    ],
)
def test_what_a_rule_makes_of_the_parameters_is_refused_by_name(
    name, factoring, message
):
    options = OptimizerOptions(optimizer=name, factoring=factoring)
    tx = make_optimizer(options, lambda count: 1e-2)
    with pytest.raises(UserError, match=f"--optimizer {name}: .*{message}"):
        tx.init({"kernel": np.ones((4, 4), np.float32)})


def test_muon_leaves_embeddings_and_the_output_to_adamw():
    names = ["wte/embedding", "h/0/up/kernel", "lm_head/kernel", "classifier/kernel"]
    tx = make_optimizer(OptimizerOptions(optimizer="muon"), lambda count: 1e-2)
    state = tx.init({name: np.ones((4, 4), np.float32) for name in names})
    partition = state[1].inner_states
    assert [
        name
        for name in names
        if isinstance(optax.tree.get(partition["muon"], "mu")[name], jax.Array)
    ] == ["h/0/up/kernel"]


@pytest.mark.parametrize(
    ("optimizer", "peak"),
    [("steady-came", 5e-3), ("adamw", 5e-3), ("came", 5e-4), ("came-muon", 15e-3)],
)
def test_rates_by_default_follow_the_scripts(optimizer, peak):
    options = OptimizerOptions(optimizer=optimizer, base_learning_rate=5e-3, warmup=0)
    assert make_schedule(options, 10)(0) == pytest.approx(peak)
    given = dataclasses.replace(options, learning_rate=1.0)
    assert make_schedule(given, 10)(0) == pytest.approx(1)


def test_schedule_warms_up_and_decays_to_a_tenth():
    schedule = make_schedule(OptimizerOptions(learning_rate=1.0, warmup=4), 20)
    rates = np.asarray(jax.vmap(schedule)(jnp.arange(21)))
    assert rates[:5].tolist() == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert (np.diff(rates[4:]) < 0).all()
    assert rates[20] == pytest.approx(0.1)
    with pytest.raises(UserError, match="--warmup 20"):
        make_schedule(OptimizerOptions(warmup=20), 20)

"""State that is saved and restored continues as if it had never been, or is refused."""

import pathlib
import runpy

import chex
import equinox as eqx
import flax.serialization
import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
import pytest

from came_optax import BalancedSplit, came, came_muon, with_master_weights

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
OLD = sorted((FIXTURES / "checkpoints").iterdir())
WRITER = runpy.run_path(str(FIXTURES / "write_checkpoint.py"))

OPTIMIZERS = {
    "published": came(1e-2),
    "options": came(
        optax.linear_schedule(1e-2, 1e-3, 10),
        weight_decay=0.1,
        weight_decay_mask={"kernel": True, "bias": False, "none": None},
        factoring=BalancedSplit(),
        mu_dtype="bfloat16",
        bias_correction=True,
    ),
    "int8": came(1e-2, mu_dtype="int8"),
    "came_muon": came_muon(1e-2, weight_decay=0.1),
    "int4": came(1e-2, mu_dtype="int4", factoring=BalancedSplit()),
    "injected": optax.inject_hyperparams(came)(1e-2),
    "guarded": optax.apply_if_finite(came(1e-2), max_consecutive_errors=3),
    "remainders": with_master_weights(came(1e-2, mu_dtype="int8")),
}
KERNEL = jax.random.normal(jax.random.key(0), (2, 48, 46))
PARAMS = {"kernel": KERNEL, "bias": jnp.linspace(-1.0, 1.0, 3), "none": None}


def orbax_round_trip(state, target, folder):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "state", state)
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder / "state", target)


def flax_round_trip(state, target, folder):
    (folder / "state").write_bytes(flax.serialization.to_bytes(state))
    return flax.serialization.from_bytes(target, (folder / "state").read_bytes())


def equinox_round_trip(state, target, folder):
    eqx.tree_serialise_leaves(folder / "state.eqx", state)
    return eqx.tree_deserialise_leaves(folder / "state.eqx", target)


def trained(tx, params=PARAMS):
    """Returns a state after two steps."""
    update, state = jax.jit(tx.update), tx.init(params)
    for _ in range(2):
        _, state = update(params, state, params)
    return state


@pytest.mark.slow(but=4)
@pytest.mark.parametrize(
    "round_trip", [orbax_round_trip, flax_round_trip, equinox_round_trip]
)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_next_step_is_identical(name, round_trip, tmp_path):
    tx, params = OPTIMIZERS[name], PARAMS
    if name == "remainders":
        params = optax.tree.cast(PARAMS, jnp.bfloat16)
    state = trained(tx, params)
    restored = round_trip(state, tx.init(params), tmp_path)
    chex.assert_trees_all_equal(restored, state, strict=True)
    ours, expected = (jax.jit(tx.update)(params, s, params) for s in (restored, state))
    chex.assert_trees_all_equal(ours, expected, strict=True)


def test_a_state_restored_without_its_types_is_refused(tmp_path):
    tx = came(1e-2)
    restored = orbax_round_trip(trained(tx), None, tmp_path)
    with pytest.raises(TypeError, match="must be a tuple as made by init, got a list"):
        tx.update(PARAMS, restored, PARAMS)


def test_a_state_cast_to_bfloat16_is_refused_unless_orbax_casts_it_back(tmp_path):
    tx = came(1e-2)
    state = trained(tx)
    rounded = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x, state
    )
    with pytest.raises(TypeError, match=r"dtype bfloat16.*cast when saved"):
        tx.update(PARAMS, rounded, PARAMS)
    restored = orbax_round_trip(rounded, tx.init(PARAMS), tmp_path)
    (updates, _), (expected, _) = (
        jax.jit(tx.update)(PARAMS, s, PARAMS) for s in (restored, state)
    )
    chex.assert_trees_all_close(updates, expected, rtol=2e-2)  # of bfloat16


@pytest.mark.parametrize("path", OLD, ids=lambda path: path.name)
def test_old_checkpoints_continue(path):
    params = {
        name: WRITER["make_params"](s) for name, (_, s) in WRITER["CASES"].items()
    }
    txs = {name: tx for name, (tx, _) in WRITER["CASES"].items()}
    target = {
        name: {"state": tx.init(params[name]), "updates": params[name]}
        for name, tx in txs.items()
    }
    with ocp.StandardCheckpointer() as checkpointer:
        old = checkpointer.restore(path, target)
    for name, tx in txs.items():
        grads = WRITER["make_grads"](params[name], 3)
        updates, _ = jax.jit(tx.update)(grads, old[name]["state"], params[name])
        chex.assert_trees_all_close(updates, old[name]["updates"], rtol=1e-4, atol=1e-7)

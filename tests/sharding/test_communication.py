"""What the compiled update of sharded parameters sends between devices."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from came_optax import BalancedSplit, came, state_sharding, steady_came
from compiling.collectives import collectives
from models.gpt2 import GPT2, SIZES
from training.sharding import make_mesh, param_shardings


def gpt2_shapes(layers, width):
    block = {
        "attention": {"kernel": (width, 3 * width), "bias": (3 * width,)},
        "projection": {"kernel": (width, width), "bias": (width,)},
        "up": {"kernel": (width, 4 * width), "bias": (4 * width,)},
        "down": {"kernel": (4 * width, width), "bias": (width,)},
        "norm": {"scale": (width,)},
    }
    tree = {
        "wte": (16 * width, width),
        "wpe": (2 * width, width),
        "blocks": [block] * layers,
    }
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        tree,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def shardings_of(params, spec_of, devices):
    """Returns shardings on a mesh of one axis."""
    mesh = Mesh(np.array(devices), ("fsdp",), axis_types=(AxisType.Auto,))
    return jax.tree.map(lambda p: NamedSharding(mesh, spec_of(p)), params)


def compiled_update(tx, params, shardings):
    """Returns the HLO of an update whose arrays are all sharded."""
    state = jax.eval_shape(tx.init, params)
    state_shardings = state_sharding(tx, params, shardings)

    def update(grads, state, params):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(
        update,
        in_shardings=(shardings, state_shardings, shardings),
        out_shardings=(shardings, state_shardings),
        donate_argnums=(1, 2),
    )
    return step.lower(params, state, params).compile().as_text()


def rows(p):
    return P("fsdp")


def columns(p):
    return P(*[None] * (len(p.shape) - 1), "fsdp")


def largest(p):
    return P("fsdp") if p.shape[0] == max(p.shape) else columns(p)


def matrices_only(p):
    return rows(p) if len(p.shape) > 1 else P()


def bytes_of_sums(params):
    """Bytes of the rows and columns of all leaves, and of a few scalars for each."""
    sizes = [sum(p.shape) + 8 for p in jax.tree.leaves(params)]
    return 4 * sum(sizes)


@pytest.mark.slow(but=1)
@pytest.mark.parametrize("spec_of", [rows, columns])
def test_only_sums_are_communicated(spec_of):
    params = gpt2_shapes(layers=1, width=64)
    tx = steady_came(1e-3, weight_decay=0.1)
    found = collectives(
        compiled_update(tx, params, shardings_of(params, spec_of, jax.devices()))
    )
    assert {c.kind for c in found} == {"all-reduce"}
    # Twice: the second moment's and the instability's statistics.
    assert sum(c.bytes for c in found) <= 2 * bytes_of_sums(params)


@pytest.mark.tpu
@pytest.mark.parametrize("spec_of", [rows, columns, largest, matrices_only])
@pytest.mark.parametrize("layers", [1, 3])
def test_tpu_needs_three_rounds_whatever_the_number_of_leaves(
    v5e_devices, spec_of, layers
):
    params = gpt2_shapes(layers, width=256)
    tx = steady_came(1e-3, factoring=BalancedSplit(), weight_decay=0.1)
    found = collectives(
        compiled_update(tx, params, shardings_of(params, spec_of, v5e_devices))
    )
    assert {c.kind for c in found} == {"all-reduce"}
    assert len(found) <= 3
    assert sum(c.bytes for c in found) <= 2 * bytes_of_sums(params)


@pytest.mark.tpu
@pytest.mark.parametrize(
    ("tx", "rounds"),
    [
        (steady_came(1e-3), 3),
        (steady_came(1e-3, mu_dtype="bfloat16"), 3),
        # Three of sums, and one of maxima, which cannot be combined with them.
        (steady_came(1e-3, mu_dtype="int8"), 4),
        (steady_came(1e-3, mu_dtype="int4"), 4),
        (came(1e-3), 3),
        (came(1e-3, clipping_threshold=None), 2),
        # The norm of an update is a sum over what the third round's sums give.
        (came(1e-3, update_clipping_threshold=1.0), 4),
        (optax.adamw(1e-3), 0),
        (optax.adafactor(1e-3), 2),
    ],
    ids=[
        "steady_came",
        "bfloat16",
        "int8",
        "int4",
        "came",
        "no-clipping",
        "update-clipping",
        "adamw",
        "adafactor",
    ],
)
def test_tpu_rounds_by_optimizer(v5e_devices, tx, rounds):
    params = gpt2_shapes(layers=1, width=256)
    with jax.numpy_dtype_promotion("standard"):  # optax.adamw needs it.
        found = collectives(
            compiled_update(tx, params, shardings_of(params, rows, v5e_devices))
        )
    assert {c.kind for c in found} <= {"all-reduce"}
    assert len(found) == rounds


def reduced_by(hlo):
    """Returns "add" or "maximum" for each all-reduce."""
    computations = dict(
        re.findall(
            r"all-reduce(?:-start)?\(.*channel_id=(\d+).*to_apply=(%[\w.-]+)", hlo
        )
    )
    roots = [
        re.search(rf"^{re.escape(name)} \(.*?ROOT \S+ = \S+ (\w+)\(", hlo, re.M | re.S)
        for name in computations.values()
    ]
    return sorted(root[1] for root in roots)


@pytest.mark.tpu
@pytest.mark.parametrize(
    ("size", "mu_dtype", "rounds"),
    [
        ("small", "float32", 3 * ["add"]),
        ("medium", "float32", 3 * ["add"]),  # Twice as many leaves.
        ("small", "int8", [*3 * ["add"], "maximum"]),
    ],
)
def test_tpu_gathers_nothing_of_gpt2(v5e_devices, size, mu_dtype, rounds):
    model = nnx.eval_shape(lambda: GPT2(SIZES[size], rngs=nnx.Rngs(0)))
    params = nnx.state(model, nnx.Param)
    mesh = make_mesh({"fsdp": 16}, v5e_devices)
    shardings = param_shardings(mesh, params, GPT2.tensor_axes)
    tx = steady_came(1e-3, weight_decay=0.1, mu_dtype=mu_dtype)
    hlo = compiled_update(tx, params, shardings)
    found = collectives(hlo)
    assert {c.kind for c in found} == {"all-reduce"}
    assert reduced_by(hlo) == rounds
    assert len(found) == len(rounds)
    # No array is larger than a row or a column, let alone a parameter.
    longest = max(n for p in jax.tree.leaves(params) for n in p.shape)
    assert max(size for c in found for size in c.arrays) <= 4 * longest
    assert sum(c.bytes for c in found) <= (len(rounds) - 1) * bytes_of_sums(params)

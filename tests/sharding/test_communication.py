"""What the compiled update of sharded parameters sends between devices."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from came_optax import BalancedSplit, came, state_sharding, steady_came
from compiling.collectives import collectives


def gpt2_shapes(layers, width):
    block = {
        "attention": {"kernel": (width, 3 * width), "bias": (3 * width,)},
        "projection": {"kernel": (width, width), "bias": (width,)},
        "up": {"kernel": (width, 4 * width), "bias": (4 * width,)},
        "down": {"kernel": (4 * width, width), "bias": (width,)},
        "norm": {"scale": (width,)},
    }
    embeddings = {"wte": (16 * width, width), "wpe": (2 * width, width)}
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        {"blocks": [block] * layers, **embeddings},
        is_leaf=lambda x: isinstance(x, tuple),
    )


def compiled_update(tx, params, spec_of, devices):
    """Returns the HLO of an update whose arrays are all sharded on one axis."""
    mesh = Mesh(np.array(devices), ("fsdp",), axis_types=(AxisType.Auto,))
    shardings = jax.tree.map(lambda p: NamedSharding(mesh, spec_of(p)), params)
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


def check_sums(found, params, rounds):
    """Only sums are sent, as few times; nothing longer than a row or a column is."""
    leaves = jax.tree.leaves(params)
    assert {c.kind for c in found} == {"all-reduce"}
    assert max(size for c in found for size in c.arrays) <= 4 * max(
        n for p in leaves for n in p.shape
    )
    # The second moment's and the instability's rows and columns; then a few scalars.
    sums = sum(4 * (sum(p.shape) + 8) for p in leaves)
    assert sum(c.bytes for c in found) <= rounds * sums


@pytest.mark.slow(but=1)
@pytest.mark.parametrize("spec_of", [rows, columns])
def test_only_sums_are_communicated(spec_of):
    params = gpt2_shapes(layers=1, width=64)
    tx = steady_came(1e-3, weight_decay=0.1)
    hlo = compiled_update(tx, params, spec_of, jax.devices())
    check_sums(collectives(hlo), params, 2)


def reduced_by(hlo):
    """Returns "add" or "maximum" for each all-reduce."""
    pattern = r"all-reduce(?:-start)?\(.*channel_id=(\d+).*to_apply=(%[\w.-]+)"
    roots = [
        re.search(rf"^{re.escape(name)} \(.*?ROOT \S+ = \S+ (\w+)\(", hlo, re.M | re.S)
        for name in dict(re.findall(pattern, hlo)).values()
    ]
    return sorted(root[1] for root in roots)


@pytest.mark.tpu
@pytest.mark.parametrize(
    ("layers", "width", "spec_of", "mu_dtype"),
    [
        *(
            (1, 256, spec, "float32")
            for spec in (rows, columns, largest, matrices_only)
        ),
        (3, 256, largest, "float32"),
        (12, 768, largest, "float32"),  # As GPT-2 small.
        (3, 256, largest, "int8"),
    ],
)
def test_tpu_needs_three_rounds_whatever_the_number_of_leaves(
    v5e_devices, layers, width, spec_of, mu_dtype
):
    params = gpt2_shapes(layers, width)
    rule = BalancedSplit()
    tx = steady_came(1e-3, factoring=rule, weight_decay=0.1, mu_dtype=mu_dtype)
    hlo = compiled_update(tx, params, spec_of, v5e_devices)
    maxima = ["maximum"] * (mu_dtype == "int8")
    assert reduced_by(hlo) == ["add"] * 3 + maxima
    assert len(collectives(hlo)) == 3 + len(maxima)
    check_sums(collectives(hlo), params, 2 + len(maxima))


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
    ids="steady_came bfloat16 int8 int4 came unclipped clipped adamw adafactor".split(),
)
def test_tpu_rounds_by_optimizer(v5e_devices, tx, rounds):
    params = gpt2_shapes(layers=1, width=256)
    with jax.numpy_dtype_promotion("standard"):  # optax.adamw needs it.
        found = collectives(compiled_update(tx, params, rows, v5e_devices))
    assert {c.kind for c in found} <= {"all-reduce"}
    assert len(found) == rounds

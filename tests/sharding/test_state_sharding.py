import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from came_optax import (
    BalancedSplit,
    Codes,
    LargestTwoAxes,
    LastTwoAxes,
    Stacked,
    came,
    state_sharding,
    with_master_weights,
)
from came_optax._factored_axes import factored_axes

PARAMS = {
    "attention": jax.ShapeDtypeStruct((16, 4, 24), jnp.float32),
    "bias": jax.ShapeDtypeStruct((32,), jnp.float32),
    "kernel": jax.ShapeDtypeStruct((16, 32), jnp.float32),
    "square": jax.ShapeDtypeStruct((32, 32), jnp.float32),
    "temperature": jax.ShapeDtypeStruct((), jnp.float32),
}
SPECS = {
    "attention": P("fsdp", None, "tensor"),
    "bias": P("tensor"),
    "kernel": P(("fsdp", "tensor")),
    "square": P(None, "fsdp"),
    "temperature": P(),
}


def find(state, name):
    return optax.tree.get(state, name)


@pytest.mark.parametrize(
    ("rule", "attention_row", "attention_col"),
    [
        (LastTwoAxes(), P("fsdp"), P("fsdp", "tensor")),
        (LargestTwoAxes(8), P("fsdp"), P(None, "tensor")),
        (BalancedSplit(), P("fsdp", None), P("tensor")),
        (Stacked(BalancedSplit()), P("fsdp"), P("fsdp", "tensor")),
    ],
)
def test_statistics_keep_the_axes_they_have(rule, attention_row, attention_col):
    params, specs = {"a": PARAMS["attention"]}, {"a": SPECS["attention"]}
    state = state_sharding(came(1e-3, factoring=rule), params, specs)
    assert find(state, "mu") == {"a": P("fsdp", None, "tensor")}
    for kind in ("v", "s"):
        assert trimmed(find(state, f"{kind}_row")["a"]) == trimmed(attention_row)
        assert trimmed(find(state, f"{kind}_col")["a"]) == trimmed(attention_col)
    assert find(state, "v") == {"a": P()}


def trimmed(spec):
    entries = list(spec)
    while entries and entries[-1] is None:
        entries.pop()
    return P(*entries)


def everywhere(params):
    return jax.tree.map(lambda _: True, params)


WRAPPERS = {
    "plain": lambda make: make(1e-3),
    "chain": lambda make: optax.chain(optax.clip_by_global_norm(1.0), make(1e-3)),
    "masked": lambda make: optax.masked(make(1e-3), everywhere),
    "partition": lambda make: optax.partition(
        {True: make(1e-3), False: optax.sgd(1e-2)}, everywhere
    ),
    "MultiSteps": lambda make: optax.MultiSteps(
        make(1e-3), 4
    ).gradient_transformation(),
    "inject": lambda make: optax.inject_hyperparams(make)(learning_rate=1e-3),
    "apply_if_finite": lambda make: optax.apply_if_finite(make(1e-3), 3),
}


INT4 = functools.partial(came, mu_dtype="int4")
LARGE = {"large": jax.ShapeDtypeStruct((64, 128), jnp.float32)}


@pytest.mark.slow(but=3)
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_wrappers_change_nothing(auto_mesh, wrap):
    state = state_sharding(wrap(came), PARAMS, SPECS)
    none = dict.fromkeys(PARAMS, P())
    rows = {"attention": P("fsdp"), "kernel": P(("fsdp", "tensor"))}
    cols = {"attention": P("fsdp", "tensor"), "square": P("fsdp")}
    assert find(state, "mu") == SPECS
    assert find(state, "v_row") == none | rows
    assert find(state, "v_col") == none | cols
    assert find(state, "v") == none | {"bias": P("tensor")}
    # On an abstract mesh, while there is another; and in codes.
    mesh = jax.sharding.AbstractMesh((4, 2), ("fsdp", "tensor"))
    specs = none | {"large": P("fsdp", "tensor")}
    shardings = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    with jax.set_mesh(auto_mesh(fsdp=4, tensor=2)):
        state = state_sharding(wrap(INT4), PARAMS | LARGE, shardings)
    placed = (NamedSharding(mesh, P(name)) for name in ("fsdp", "tensor"))
    assert find(state, "mu")["large"] == Codes(shardings["large"], *placed)


def test_init_places_the_state_and_updates_compile_once(auto_mesh):
    """Remainders of bfloat16 parameters too, which are laid as these."""
    mesh = auto_mesh(fsdp=4, tensor=2)
    shardings = {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}
    params = {name: jnp.ones(p.shape, jnp.bfloat16) for name, p in PARAMS.items()}
    alone = params | {"bias": jnp.ones(32)}
    params, tx = jax.device_put(alone, shardings), with_master_weights(came(1e-3))
    place = state_sharding(tx, params, shardings)
    assert place.remainder == shardings | {"bias": NamedSharding(mesh, P())}
    assert find(place, "mu") == shardings
    state = jax.jit(tx.init, out_shardings=place)(params)
    assert jax.tree.map(lambda x: x.sharding, state) == place
    # A compiled function takes no other shardings than it was compiled for.
    update = jax.jit(tx.update, out_shardings=(shardings, place), donate_argnums=1)
    compiled = update.lower(params, state, params).compile()
    alone_update = jax.jit(tx.update)
    alone_state = tx.init(alone)
    for _ in range(2):
        updates, state = compiled(params, state, params)
        expected, alone_state = alone_update(alone, alone_state, alone)
    chex.assert_trees_all_close(updates, expected, rtol=1e-5)
    chex.assert_trees_all_equal(state.remainder, alone_state.remainder)


def test_one_sharding_may_stand_for_many(auto_mesh):
    for one in NamedSharding(auto_mesh(fsdp=8), P()), P():
        state = state_sharding(came(1e-3), PARAMS, one)
        assert set(jax.tree.leaves(state)) == {one}
    nested = {"a": PARAMS, "b": PARAMS}
    state = state_sharding(came(1e-3), nested, {"a": P(), "b": SPECS})
    assert find(state, "mu") == {"a": dict.fromkeys(PARAMS, P()), "b": SPECS}


@st.composite
def sharded_leaves(draw):
    """A shape and a spec that uses some of three mesh axes, each once."""
    shape = draw(st.lists(st.integers(1, 9), min_size=0, max_size=4))
    entries = [[] for _ in shape]
    if shape:
        for axis in draw(st.permutations("abc")):
            where = draw(st.none() | st.integers(0, len(shape) - 1))
            if where is not None:
                entries[where].append(axis)
    spec = [{0: None, 1: e[0] if e else None}.get(len(e), tuple(e)) for e in entries]
    return tuple(shape), P(*spec)


@given(
    leaves=st.lists(sharded_leaves(), min_size=1, max_size=3),
    rule=st.sampled_from([LastTwoAxes(), LargestTwoAxes(2), BalancedSplit()]),
)
def test_any_shape_and_spec(leaves, rule):
    params = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape, _ in leaves]
    state = state_sharding(came(1e-3, factoring=rule), params, [s for _, s in leaves])
    rows, cols, full, mu = (find(state, k) for k in ("v_row", "v_col", "v", "mu"))
    for (shape, spec), row, col, v, m in zip(leaves, rows, cols, full, mu, strict=True):
        axes = factored_axes(rule, jnp.zeros(shape))
        axes = axes if axes.factored else None
        entries = [*spec, *[None] * (len(shape) - len(spec))]

        def without(reduced, entries=entries):
            return trimmed(P(*(e for i, e in enumerate(entries) if i not in reduced)))

        assert m == trimmed(spec)
        assert row == (P() if axes is None else without(axes.col))
        assert col == (P() if axes is None else without(axes.row))
        assert v == (without(()) if axes is None else P())


@pytest.mark.parametrize("mu_dtype", ["int8", "int4"])
def test_nested_wrappers_place_quantized_momentum(auto_mesh, mu_dtype):
    mesh = auto_mesh(fsdp=4, tensor=2)
    specs = {"kernel": P("fsdp", "tensor"), "bias": P("tensor")}
    shardings = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    params = {"kernel": jnp.ones((64, 128)), "bias": jnp.ones(128)}
    params = jax.device_put(params, shardings)
    make = optax.inject_hyperparams(functools.partial(came, mu_dtype=mu_dtype))
    parted = optax.partition(
        {"came": make(learning_rate=1e-3), "sgd": optax.sgd(1e-2, momentum=0.9)},
        {"kernel": "came", "bias": "sgd"},
    )
    chain = optax.chain(optax.clip_by_global_norm(1.0), parted)
    tx = optax.MultiSteps(chain, every_k_schedule=1).gradient_transformation()
    place = state_sharding(tx, params, shardings)
    assert place.acc_grads == shardings
    assert find(place, "trace")["bias"] == shardings["bias"]
    state = jax.jit(tx.init, out_shardings=place)(params)
    # A compiled function takes no other shardings than it was compiled for.
    update = jax.jit(tx.update, out_shardings=(shardings, place))
    with jax.numpy_dtype_promotion("standard"):  # optax.MultiSteps needs it.
        compiled = update.lower(params, state, params).compile()
    for _ in range(2):
        updates, state = compiled(params, state, params)
    chex.assert_tree_all_finite(updates)
    codes = find(state, "mu")["kernel"].values
    assert codes.sharding.spec == P("fsdp", "tensor")
    assert jnp.issubdtype(codes.dtype, jnp.integer)


def test_mesh_axes_that_do_not_divide_are_left_out(auto_mesh):
    # Such as a quantised momentum's scales, one for each block of a parameter.
    def init(params):
        return jax.tree.map(lambda p: jnp.zeros_like(p.reshape(6, -1)[:, 0]), params)

    tx = optax.GradientTransformation(init, lambda *args: args[:2])
    params = [jnp.zeros(24), jnp.zeros(24), jnp.zeros(48)]
    mesh = auto_mesh(a=2, b=4)
    specs = [P("a"), P("b"), P(("a", "b"))]
    state = state_sharding(tx, params, [NamedSharding(mesh, s) for s in specs])
    assert [s.spec for s in state] == [P("a"), P(), P("a")]


MESH = Mesh(np.array(jax.devices()).reshape(4, 2), ("fsdp", "tensor"))
OTHER = NamedSharding(Mesh(np.array(jax.devices()), ("fsdp",)), P())
NO_SPEC = NamedSharding(MESH, P())


@pytest.mark.parametrize(
    ("shardings", "error", "message"),
    [
        ({"w": "fsdp", "b": P()}, TypeError, r"at 'w' is 'fsdp'; allowed are Named"),
        (SingleDeviceSharding(jax.devices()[0]), TypeError, "SingleDeviceSharding"),
        ({"w": P(), "b": NO_SPEC}, TypeError, "mixes NamedSharding and PartitionSpec"),
        ({"w": OTHER, "b": NO_SPEC}, ValueError, "names 2 meshes"),
        (
            {"w": P("fsdp"), "b": P(None, "fsdp")},
            ValueError,
            r"at 'b' is .*'fsdp'.*, for a parameter of shape \(4,\)",
        ),
        ({"w": P()}, ValueError, "."),
    ],
)
def test_errors_say_what_is_wrong(shardings, error, message):
    params = {"w": jnp.ones((4, 4)), "b": jnp.ones(4)}
    with pytest.raises(error, match=message):
        state_sharding(came(1e-3), params, shardings)

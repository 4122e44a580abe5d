"""Any tree, rule and options: init and three updates keep structure and types."""

import dataclasses
import itertools
import random
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from came_optax import BalancedSplit, FactoredAxes, LargestTwoAxes, LastTwoAxes, came
from came_optax._factored_axes import factored_axes

SHAPES = [(3, 2), (), (2, 3, 2), (5,), (2, 1, 3, 2), (1, 1), (1,), (0,), (0, 4)]
SHAPES += [(2, 2, 1, 3, 2), (64, 64)]  # the last is large enough to be quantized
EXAMPLES = settings.default.max_examples  # 25, unless --hypothesis-profile says so.
DTYPES = ["float16", "bfloat16", "float32", "complex64"]


class Pair(NamedTuple):
    first: Any
    second: Any


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass
class Module:
    """A custom node, with something that is no child."""

    weights: Any
    activation: str

    def tree_flatten_with_keys(self):
        key = jax.tree_util.GetAttrKey("weights")
        return [(key, self.weights)], self.activation

    @classmethod
    def tree_unflatten(cls, activation, children):
        return cls(*children, activation)


@dataclasses.dataclass(frozen=True)
class RandomAxes:
    """Uses the axes of each leaf at random, the same way at each call."""

    seed: int

    def axes(self, path, shape):
        rng = random.Random(f"{self.seed} {path} {shape}")
        axes = rng.sample(range(len(shape)), len(shape))
        if len(shape) < 2 or rng.random() < 0.1:
            return FactoredAxes(stack=tuple(axes[: rng.randint(0, len(shape))]))
        cuts = sorted(rng.sample(range(1, len(shape) + 1), k=2))
        row, col = axes[: cuts[0]], axes[cuts[0] : cuts[1]]
        stack = axes[cuts[1] : rng.randint(cuts[1], len(shape))]
        return FactoredAxes(tuple(row), tuple(col), tuple(stack))


def array(shape, dtype, seed=0):
    values = np.random.default_rng(seed).normal(size=shape)
    return jnp.asarray(values.astype(jnp.dtype(dtype)))


leaves = st.builds(array, st.sampled_from(SHAPES), st.sampled_from(DTYPES))
trees = st.recursive(
    leaves | st.none(),
    lambda children: (
        st.lists(children, max_size=3)
        | st.lists(children, max_size=2).map(tuple)
        | st.dictionaries(st.sampled_from(["kernel", "bias", "0"]), children)
        | st.builds(Pair, children, children)
        | st.builds(Module, children, st.just("gelu"))
        | children.map(lambda subtree: {"one": subtree, "same": subtree})
    ),
    max_leaves=4,
).filter(lambda tree: tree is not None)  # which would say that there are no params
rules = st.sampled_from(
    [LastTwoAxes(), LargestTwoAxes(2), BalancedSplit()]
) | st.builds(RandomAxes, st.integers(0, 1000))
options = st.fixed_dictionaries(
    {
        "learning_rate": st.sampled_from([1e-3, optax.linear_schedule(1e-2, 1e-3, 2)]),
        "factoring": rules,
    },
    optional={
        "bias_correction": st.booleans(),
        "clipping_threshold": st.none(),
        "mu_dtype": st.sampled_from(["bfloat16", "int8", "int4"]),
        "update_clipping_threshold": st.just(1.0),
        "weight_decay": st.just(0.1),
    },
)
wrappers = st.sampled_from(["none", "injected", "masked"])


def optimizer(wrapper, kwargs, params):
    if wrapper == "injected":
        inject = optax.inject_hyperparams(came, hyperparam_dtype=jnp.float32)
        return inject(**kwargs)
    mask = jax.tree.map(lambda p: p.ndim != 1, params)
    return optax.masked(came(**kwargs), mask) if wrapper == "masked" else came(**kwargs)


def grads_for(params, step):
    """Returns gradients; float32 for some narrow leaves, as in mixed precision."""

    def grad(p):
        is_wide = p.size % 2 and p.ndim != 1 and p.dtype != jnp.complex64
        return array(p.shape, "float32" if is_wide else p.dtype.name, step)

    return jax.tree.map(grad, params)


def types(tree):
    return jax.tree.map(jax.typeof, tree)


def promotion(wrapper):
    """Injected float32 scalars meet complex leaves in optax's own transformations."""
    return jax.numpy_dtype_promotion("standard" if wrapper == "injected" else "strict")


def check(wrapper, kwargs, params, *, jitted):
    tx, traces = optimizer(wrapper, kwargs, params), 0

    def step(grads, state, params):
        nonlocal traces
        traces += 1
        return tx.update(grads, state, params)

    update = jax.jit(step) if jitted else step
    state = tx.init(params)
    expected = types(params), types(state)
    for number in range(3):
        with promotion(wrapper):
            updates, state = update(grads_for(params, number), state, params)
        assert (types(updates), types(state)) == expected
        chex.assert_tree_all_finite((updates, state))
        params = optax.apply_updates(params, updates)
    assert traces == (1 if jitted else 3)


def test_many_draws_are_factored():
    factored = []

    @given(params=trees, rule=rules)
    @settings(max_examples=100)
    def draw(params, rule):
        axes = jax.tree.leaves(factored_axes(rule, params))
        factored.extend(some.factored for some in axes)

    draw()
    assert np.mean(factored) > 0.3


@given(params=trees, wrapper=wrappers, kwargs=options)
@settings(max_examples=6 * EXAMPLES)
def test_types(params, wrapper, kwargs):
    tx = optimizer(wrapper, kwargs, params)
    state = jax.eval_shape(tx.init, params)
    with promotion(wrapper):
        updates, after = jax.eval_shape(tx.update, grads_for(params, 0), state, params)
    assert types(updates) == types(params)
    assert types(after) == types(state)


@given(params=trees, wrapper=wrappers, kwargs=options)
@settings(max_examples=2 * EXAMPLES)
def test_jitted_updates(params, wrapper, kwargs):
    check(wrapper, kwargs, params, jitted=True)


examples = itertools.count()


@pytest.mark.nightly
@given(params=trees, wrapper=wrappers, kwargs=options, jitted=st.booleans())
@settings(max_examples=2_000)
def test_jitted_and_eager_updates(params, wrapper, kwargs, jitted):
    if next(examples) % 50 == 0:
        jax.clear_caches()  # They keep what each example compiled: gigabytes.
    check(wrapper, kwargs, params, jitted=jitted)

"""The traffic of an update on a TPU v5e; deterministic for one version of JAX."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from compiled_traffic import EXACT
from measuring.examples import topologies
from measuring.optimizers import OPTIMIZERS
from measuring.updates import count
from measuring.zoo import gpt2_shapes

pytestmark = pytest.mark.tpu


@pytest.fixture(scope="module")
def v5e():
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed; it comes with the `tpu` extra")
    return topologies.target("v5e:2x2").devices[0]


def layers(number):
    """Matrices that fit on the chip, and vectors."""
    shapes = {"kernel": (768, 3072), "bias": (3072,), "scale": (768,)}
    return [
        {name: jax.ShapeDtypeStruct(s, jnp.float32) for name, s in shapes.items()}
        for _ in range(number)
    ]


def embedding(vocabulary=50304):
    """A matrix that doesn't fit, as large as GPT-2's with an even vocabulary."""
    return jax.ShapeDtypeStruct((vocabulary, 768), jnp.float32)


def measured(name, params, device):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return count(OPTIMIZERS[name](), params, device)


@pytest.mark.parametrize("name", EXACT)
def test_the_count_is_exact_where_it_is_known(v5e, name):
    found = measured(name, [embedding(), *layers(1)], v5e)
    assert found["bytes/parameter"] == EXACT[name]


# In came the gradient is read three times, the parameter read and written, and the
# momentum read, written and read again. Nesterov momentum needs the gradient once more,
# as codes do, of which the momentum is made anew in each pass.
@pytest.mark.parametrize(
    ("name", "bytes_per_parameter"),
    [
        ("steady_came, float32", 36.03),
        ("steady_came, bfloat16", 32.03),
        ("steady_came, int8", 26.04),
        ("steady_came, int4", 25.04),
        ("came, float32", 32.03),
    ],
)
def test_traffic_of_a_matrix_that_does_not_fit(v5e, name, bytes_per_parameter):
    found = measured(name, embedding(), v5e)
    assert found["bytes/parameter"] <= bytes_per_parameter
    assert found["temporaries (MB)"] <= 4 * embedding().size / 1e6


def test_an_odd_vocabulary_costs_4_bits_one_more_pass(v5e):
    found = measured("steady_came, int4", embedding(50257), v5e)
    assert found["bytes/parameter"] <= 29.04
    assert found["temporaries (MB)"] <= 1


def test_4_bits_of_a_stack_of_layers(v5e):
    stack = jax.ShapeDtypeStruct((24, 1024, 4096), jnp.float32)
    found = measured("steady_came, int4", stack, v5e)
    assert found["bytes/parameter"] <= 28.04
    assert found["temporaries (MB)"] <= 102


# Everything once is 20, 16, 14 and 13.
@pytest.mark.parametrize(
    ("name", "bytes_per_parameter"),
    [
        ("steady_came, float32", 20.05),
        ("steady_came, bfloat16", 16.05),
        ("steady_came, int8", 14.07),
        ("steady_came, int4", 13.07),
        ("came, float32", 20.05),
    ],
)
def test_traffic_of_matrices_that_fit(v5e, name, bytes_per_parameter):
    found = measured(name, layers(2), v5e)
    assert found["bytes/parameter"] <= bytes_per_parameter
    assert found["temporaries (MB)"] <= 4 * 768 * 3072 / 1e6


# Codes of many matrices at once would leave no room on the chip: 17.84 and 142 MB.
@pytest.mark.parametrize(
    ("name", "bytes_per_parameter", "temporaries"),
    [
        ("steady_came, float32", 26.81, 44),
        ("steady_came, int4", 19.14, 155),
        ("came, float32", 23.78, 75),
    ],
)
def test_traffic_of_gpt2(v5e, name, bytes_per_parameter, temporaries):
    found = measured(name, gpt2_shapes("small"), v5e)
    assert found["bytes/parameter"] <= bytes_per_parameter
    assert found["temporaries (MB)"] <= temporaries


def test_kernels_grow_linearly_with_leaves(v5e):
    one, two, four = (
        measured("steady_came, float32", layers(n), v5e)["kernels"] for n in (1, 2, 4)
    )
    assert four - two <= 2.1 * (two - one)

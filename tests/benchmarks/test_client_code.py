"""Each client's model learns under its own optimizer and under ours."""

import jax
import pytest

pytest.importorskip("haiku")
pytest.importorskip("haliax")  # Ignores what it warns of.
from client_code import CLIENTS, row, trainer

from came_optax import state_memory


@pytest.fixture(autouse=True)
def promotion():
    """As it is for a user."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.nightly
@pytest.mark.parametrize("name", CLIENTS)
def test_clients_learn(name):
    client = CLIENTS[name]()
    for tx in (client.theirs, client.ours):
        losses = trainer(client, tx, 60)(jax.random.key(0))
        assert losses[-10:].mean() < losses[:10].mean() - 0.02


@pytest.mark.parametrize(
    ("name", "leaf", "rows", "cols"),
    [
        ("MaxText", "params/decoder/layers/mlp/wi_0/kernel", (64, 2), (2, 256)),
        ("Levanter", "layers/stacked/up_proj/weight/0", (2, 256), (2, 64)),
        ("EasyLM", "transformer/h/0/feed_forward/w1/kernel", (64,), (256,)),
        ("Gemma", "transformer/layer_0/attn/kv_einsum/w", (2, 64), (2, 1, 32)),
        ("nanodo", "blocks_0/CausalAttn_0/query/kernel", (64,), (2, 32)),
        (
            "big_vision",
            "Transformer/encoderblock/MultiHeadDotProductAttention_0/query/kernel",
            (2, 64),
            (2, 2, 32),
        ),
        ("PureJaxRL", "params/Dense_1/kernel", (64,), (64,)),
        ("Haiku", "__layer_stack_no_per_layer/linear/w", (2, 256), (2, 64)),
        ("Equinox", "layers/layers/0/weight", (2, 256), (2, 64)),
    ],
    ids=CLIENTS,
)
def test_statistics_are_those_of_matrices(name, leaf, rows, cols):
    """The page's rules find the names that each client has."""
    client = CLIENTS[name]()
    shapes = jax.eval_shape(client.init, jax.random.key(0))
    memory = state_memory(client.ours, shapes)
    assert (memory.rows[leaf], memory.cols[leaf]) == (rows, cols)
    assert not memory.smaller


def test_row_of_the_table():
    runs = [
        {
            "client": "nanodo",
            "model": "transformer",
            "optimizer": optimizer,
            "bytes/param": size,
            "every 10th loss": [5.0, loss],
            "final loss": loss + seed,
        }
        for optimizer, size, loss in (("adamw", 8.0, 3.0), ("steady_came", 4.0, 2.0))
        for seed in (0, 1)
    ]
    assert list(row(runs).values())[2:] == [
        "5.00",
        "adamw",
        "3.500 (3.000 to 4.000)",
        "2.500 (2.000 to 3.000)",
        "8.00",
        "4.00",
    ]

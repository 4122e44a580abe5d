"""Train LoRA's adapters alone: what is frozen has no optimizer state."""

import jax
import jax.numpy as jnp
import optax

from came_optax import state_memory, steady_came


def init_params(rank=8, width=1024):
    keys = jax.random.split(jax.random.key(0))
    return {
        "kernel": jax.random.normal(keys[0], (width, width)) / width**0.5,
        "lora_a": jax.random.normal(keys[1], (width, rank)) / width**0.5,
        "lora_b": jnp.zeros((rank, width)),
    }


def forward(params, x):
    return x @ params["kernel"] + x @ params["lora_a"] @ params["lora_b"]


def label(params):
    return {name: "train" if "lora" in name else "freeze" for name in params}


tx = optax.partition(
    {"train": steady_came(1e-4, mu_dtype="int8"), "freeze": optax.set_to_zero()},
    label,
)


@jax.jit
def train_step(params, state, x, y):
    grads = jax.grad(lambda params: jnp.mean((forward(params, x) - y) ** 2))(params)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


params = init_params()
x, y = jax.random.normal(jax.random.key(1), (2, 32, 1024))
trained, state = train_step(params, tx.init(params), x, y)


def bytes_per_adapter_param(rank):
    shapes = jax.eval_shape(lambda: init_params(rank))
    return state_memory(tx, shapes).total / (2 * 1024 * rank)


print(state_memory(tx, params).by_leaf_table())
for rank in 1, 2, 4, 8, 16, 64:
    print(f"rank {rank}: {bytes_per_adapter_param(rank):.1f} bytes a parameter")

# The tests hold this.
assert jnp.array_equal(trained["kernel"], params["kernel"])
assert not jnp.array_equal(trained["lora_b"], params["lora_b"])
assert "kernel" not in state_memory(tx, params).by_leaf
assert state_memory(tx, params).rows == {"lora_a": (1024,), "lora_b": (8,)}
sizes = {rank: round(bytes_per_adapter_param(rank), 1) for rank in (1, 2, 4, 8, 16, 64)}
assert sizes == {1: 8.0, 2: 8.0, 4: 4.0, 8: 2.5, 16: 1.8, 64: 1.2}

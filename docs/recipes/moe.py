"""A mixture of experts: stacked on one axis, each updated as if it stood alone.

To see it on one CPU: XLA_FLAGS=--xla_force_host_platform_device_count=8
"""

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from came_optax import Stacked, state_memory, state_sharding, steady_came

EXPERTS, WIDTH, HIDDEN = 8, 128, 512
mesh = jax.make_mesh((jax.device_count(),), ("expert",), axis_types=(AxisType.Auto,))
tx = steady_came(1e-3, mu_dtype="int8", factoring=Stacked(where="experts/"))


def init_params():
    keys = jax.random.split(jax.random.key(0), 3)
    experts = {
        "up": 0.1 * jax.random.normal(keys[0], (EXPERTS, WIDTH, HIDDEN)),
        "down": 0.1 * jax.random.normal(keys[1], (EXPERTS, HIDDEN, WIDTH)),
    }
    return {"router": jax.random.normal(keys[2], (WIDTH, EXPERTS)), "experts": experts}


def forward(params, x):
    gates = jax.nn.softmax(x @ params["router"])
    gates *= jax.nn.one_hot(gates.argmax(-1), EXPERTS)  # One expert for each token.
    hidden = jnp.einsum("td,edh->teh", x, params["experts"]["up"])
    return jnp.einsum(
        "te,teh,ehd->td", gates, jax.nn.relu(hidden), params["experts"]["down"]
    )


params_sharding = {
    "router": NamedSharding(mesh, P()),
    "experts": NamedSharding(mesh, P("expert")),
}
abstract = jax.eval_shape(init_params)
shardings = (
    jax.tree.broadcast(params_sharding, abstract),
    state_sharding(tx, abstract, params_sharding),
)


@jax.jit(out_shardings=shardings)
def init():
    params = init_params()
    return params, tx.init(params)


@jax.jit(out_shardings=shardings)
def train_step(params, state, x):
    grads = jax.grad(lambda params: jnp.mean((forward(params, x) - x) ** 2))(params)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def momentum_by_expert(state):
    scale = optax.tree.get(state, "mu")["experts"]["up"].row_scale
    return scale.max(axis=1)


params, state = init()
x = jax.random.normal(jax.random.key(1), (256, WIDTH))
params, state = train_step(params, state, x)
before = momentum_by_expert(state)

one = x[:1]  # A batch of one token, for one expert.
for _ in range(10):
    params, state = train_step(params, state, one)
after = momentum_by_expert(state)
chosen = (one @ params["router"]).argmax()
print("expert", chosen, "was chosen; momentum to", after / before)
print(state_memory(tx, params).by_leaf_table())

# The tests hold this.
others = jnp.arange(EXPERTS) != chosen
assert jnp.allclose((after / before)[others], 0.9**10, rtol=1e-4)
assert after[chosen] > before[chosen]
assert state_memory(tx, params).rows["experts/up"] == (EXPERTS, WIDTH)
assert state_memory(tx, params).bytes_per_param < 1.13
for name in "v_row", "v_col", "s_row", "s_col":
    assert optax.tree.get(state, name)["experts"]["up"].sharding.spec == P("expert")
assert optax.tree.get(state, "mu")["experts"]["up"].values.sharding.spec == P("expert")

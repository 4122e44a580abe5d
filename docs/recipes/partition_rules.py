"""Shardings from regular expressions, as in EasyLM.

Such rules are written for parameters. Over a whole train state they also match the
statistics, whose paths end alike and which have fewer axes: a kernel's two-axis spec
does not fit its rows. Match the parameters, and let `state_sharding` derive the rest.

To see it on one CPU: XLA_FLAGS=--xla_force_host_platform_device_count=8
"""

import re

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from came_optax import state_sharding, steady_came

RULES = [
    ("embedding$", P("tensor", "fsdp")),
    ("(query|up)/kernel$", P("fsdp", "tensor")),
    ("(out|down)/kernel$", P("tensor", "fsdp")),
    ("bias$", P()),
]


devices = jax.device_count()
shape = (2, devices // 2) if devices % 2 == 0 else (1, devices)
mesh = jax.make_mesh(shape, ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)


def match_rules(rules, params):
    def sharding(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        for pattern, spec in rules:
            if re.search(pattern, name):
                return NamedSharding(mesh, spec)
        raise ValueError(f"no rule matches {name!r} of shape {leaf.shape}")

    return jax.tree.map_with_path(sharding, params)


def init_params():
    dense = {"kernel": jnp.ones((64, 64)), "bias": jnp.zeros(64)}
    return {"embedding": jnp.ones((128, 64)), "layer": {"query": dense, "out": dense}}


tx = optax.chain(optax.clip_by_global_norm(1.0), steady_came(1e-3, mu_dtype="int8"))
abstract = jax.eval_shape(init_params)
params_sharding = match_rules(RULES, abstract)
shardings = params_sharding, state_sharding(tx, abstract, params_sharding)


@jax.jit(out_shardings=shardings)
def init():
    params = init_params()
    return params, tx.init(params)


params, state = init()
for name in "v_row", "v_col":
    statistic = optax.tree.get(state, name)["layer"]["query"]["kernel"]
    print(name, statistic.shape, statistic.sharding.spec)

# The tests hold this.
assert (
    optax.tree.get(state, "v_row")["layer"]["query"]["kernel"].sharding.spec[0]
    == "fsdp"
)

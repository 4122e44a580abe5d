"""Average the gradients of four small batches for each update.

`optax.MultiSteps` keeps their mean beside the optimizer's state: 4 more bytes for each
float32 parameter, which is as much as CAME's state itself. Where all four batches are
at hand, a `jax.lax.scan` over them inside one training step has the same peak but keeps
nothing between steps.
"""

import jax
import jax.numpy as jnp
import optax

from came_optax import steady_came

params = {"kernel": jnp.ones((128, 128))}
tx = optax.MultiSteps(steady_came(1e-3), every_k_schedule=4)
state = tx.init(params)
update = jax.jit(tx.update)

for step in range(8):
    grads = {"kernel": jax.random.normal(jax.random.key(step), (128, 128))}
    updates, state = update(grads, state, params)
    print(step, "moves" if updates["kernel"].any() else "gathers")
    params = optax.apply_updates(params, updates)


def size(tree):
    return sum(x.nbytes for x in jax.tree.leaves(tree))


added = size(state) - size(state.inner_opt_state)
print(f"accumulation adds {added / params['kernel'].size:.2f} bytes per parameter")

# The tests hold this.
assert state.gradient_step == 2 and added / params["kernel"].size >= 4

"""Keep a moving average of the weights, for evaluation."""

import jax
import jax.numpy as jnp
import optax

from came_optax import steady_came

params = {"kernel": jnp.ones((16, 8))}
tx, average = steady_came(1e-2), optax.ema(0.99)
state, average_state = tx.init(params), average.init(params)


@jax.jit
def step(params, state, average_state, grads):
    updates, state = tx.update(grads, state, params)
    params = optax.apply_updates(params, updates)
    averaged, average_state = average.update(params, average_state)
    return params, state, averaged, average_state


for _ in range(10):
    params, state, averaged, average_state = step(params, state, average_state, params)

# The tests hold this.
assert (averaged["kernel"] > params["kernel"]).all()  # It lags behind.

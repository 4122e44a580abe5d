"""Skip updates whose gradients are not finite; state and parameters stay as they were.

CAME passes NaN and infinity on as they come: one such step would spoil the moments for
good. `optax.apply_if_finite` is the guard, and counts what it skipped.
"""

import jax
import jax.numpy as jnp
import optax

from came_optax import steady_came

params = {"kernel": jnp.ones((16, 8))}
tx = optax.apply_if_finite(steady_came(1e-2), max_consecutive_errors=5)
state = tx.init(params)
update = jax.jit(tx.update)

good = {"kernel": jnp.ones((16, 8))}
bad = {"kernel": jnp.full((16, 8), jnp.nan)}
_, state = update(good, state, params)
updates, after_bad = update(bad, state, params)

# The tests hold this.
assert not updates["kernel"].any()
assert after_bad.total_notfinite == 1
assert jax.tree.all(
    jax.tree.map(jnp.array_equal, after_bad.inner_state, state.inner_state)
)

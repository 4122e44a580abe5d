"""Muon with momentum in 8 bits for hidden matrices, CAME in 8 bits for the rest."""

import jax
import jax.numpy as jnp
import optax

from came_optax import quantized_ema, state_memory, steady_came


def orthogonalized(m):
    """Brings all singular values of a matrix near 1 (Newton and Schulz)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = m / (jnp.linalg.norm(m) + 1e-7)
    x = x.T if x.shape[0] > x.shape[1] else x
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    x = x.T if m.shape[0] > m.shape[1] else x
    return 0.2 * max(m.shape) ** 0.5 * x  # The size that AdamW's updates have.


def muon(learning_rate, weight_decay=0.0):
    return optax.chain(
        quantized_ema(0.95, nesterov=True, mu_dtype="int8"),
        optax.stateless(lambda updates, _: jax.tree.map(orthogonalized, updates)),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


def label(path, leaf):
    return "muon" if leaf.ndim == 2 and path[0].key != "embedding" else "came"


tx = optax.partition(
    {"muon": muon(2e-2), "came": steady_came(2e-2, mu_dtype="int8")},
    lambda params: jax.tree.map_with_path(label, params),
)

keys = jax.random.split(jax.random.key(0), 3)
params = {
    "embedding": jax.random.normal(keys[0], (512, 128)),
    "up": {"kernel": 0.1 * jax.random.normal(keys[1], (128, 512))},
    "down": {"kernel": 0.1 * jax.random.normal(keys[2], (512, 128))},
}
state = tx.init(params)


def loss_fn(params, tokens):
    x = params["embedding"][tokens]
    hidden = jax.nn.relu(x @ params["up"]["kernel"])
    logits = hidden @ params["down"]["kernel"] @ params["embedding"].T
    labels = jnp.roll(tokens, 1)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@jax.jit
def train_step(params, state, tokens):
    loss, grads = jax.value_and_grad(loss_fn)(params, tokens)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss


tokens = jnp.arange(64)
losses = []
for _ in range(30):
    params, state, loss = train_step(params, state, tokens)
    losses.append(float(loss))
print(f"loss {losses[0]:.2f} to {losses[-1]:.2f}")
print(state_memory(tx, params))

# The tests hold this.
assert losses[-1] < 1
assert state_memory(tx, params).bytes_per_param < 1.1

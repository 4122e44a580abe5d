"""Optimizers that are asked for all that Optax asks of its own."""

import optax

from came_optax import (
    BalancedSplit,
    came,
    scale_by_confidence,
    scale_by_factored_moment,
    steady_came,
)

OPTIMIZERS = {
    "came": came(1e-3),
    "options": steady_came(
        optax.linear_schedule(1e-2, 1e-3, 10),
        weight_decay=0.1,
        factoring=BalancedSplit(),
        mu_dtype="bfloat16",
        update_clipping_threshold=1.0,
    ),
    "int8": came(1e-3, mu_dtype="int8"),
    "int4": came(1e-3, mu_dtype="int4", factoring=BalancedSplit()),
    "first half": scale_by_factored_moment(),
    "second half": scale_by_confidence(),
}

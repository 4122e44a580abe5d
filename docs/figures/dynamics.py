"""Draws docs/figures/dynamics.svg: how far CAME steps, in learning rates.

To draw it anew:

    python docs/figures/dynamics.py
"""

import pathlib

import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import optax
from drawing import COLORS, STYLE

from came_optax import scale_by_came, steady_came

STEPS = 3000
SHAPE = (64, 64)
PUBLISHED = COLORS["came"]
OPTIMIZERS = {
    "steady_came": (steady_came(1.0), COLORS["steady_came"], "-"),
    "CAME, as published": (scale_by_came(), PUBLISHED, "-"),
    "bias_correction": (scale_by_came(bias_correction=True), PUBLISHED, "--"),
    "update_clipping_threshold=1": (
        scale_by_came(update_clipping_threshold=1.0),
        PUBLISHED,
        ":",
    ),
    "Adam": (optax.scale_by_adam(), COLORS["AdamW"], "-."),
}


def noise(step):
    return jax.random.normal(jax.random.fold_in(jax.random.key(0), step), SHAPE)


def constant(step):
    del step
    return jax.random.normal(jax.random.key(0), SHAPE)


def update_rms(tx, gradient):
    """Returns RMS(Δ) at each step."""

    def step(state, index):
        update, state = tx.update(gradient(index), state)
        return state, jnp.sqrt(jnp.mean(update**2))

    state = tx.init(jnp.zeros(SHAPE))
    return jax.lax.scan(step, state, jnp.arange(STEPS))[1]


def main():
    figure, panels = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    steps = np.unique(np.geomspace(1, STEPS, 150).round().astype(int))
    for panel, gradient in zip(panels, (noise, constant), strict=True):
        for label, (tx, color, line) in OPTIMIZERS.items():
            rms = jax.jit(update_rms, static_argnums=(0, 1))(tx, gradient)
            panel.loglog(steps, rms[steps - 1], line, color=color, label=label)
        panel.set_title(f"{gradient.__name__} gradient")
        panel.set_xlabel("step")
        panel.set_ylabel("RMS of the update\n(learning rates)")
    lines, labels = panels[0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=3, frameon=False)
    path = pathlib.Path(__file__).with_suffix(".svg")
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    with matplotlib.rc_context(STYLE):
        main()

"""The loop and what it needs: devices, optimizers, steps, checkpoints, metrics."""

"""The training step, the optimizers, and what is split over which devices."""

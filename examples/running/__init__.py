"""A run from the command line to its end: folder, checkpoints, loop, metrics."""

"""Transformer models in Flax NNX, one file each, that import nothing of the others."""

"""Transformer models in Flax NNX, one file each, and how to save and sample them."""

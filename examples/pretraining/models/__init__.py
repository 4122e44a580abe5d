"""Transformer models in Flax NNX, one file each."""

"""What the pretraining examples share, one idea a module; private to the examples."""

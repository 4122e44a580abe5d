"""What is trained: each task is data, a model, a loss and metrics, in one file."""

"""What the training examples share: `data`, `models` and `training`.

`task.Task` is what joins the three: a model, its loss and its data. All of it is
private to the examples.
"""

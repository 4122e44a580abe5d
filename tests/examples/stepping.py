"""A few steps of training, for the tests of the step and of meshes."""

from training import sharding, step


def train(task, tx, batch, mesh, steps=3, accumulate=1):
    """Returns the state after some steps on one batch, and their losses."""
    state = step.make_init(task, tx, mesh)(0)
    train_step = step.make_train_step(task, tx, accumulate, 0, mesh)
    losses = []
    for _ in range(steps):
        state, metrics = train_step(state, sharding.put_batch(batch, mesh))
        losses.append(float(metrics["loss"]))
    assert train_step._cache_size() == 1
    return state, losses

"""The tasks: a loss counts rows of weight one, and blank records have the shapes."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from flax import nnx

from data import pipeline
from models import bert, classifier, gpt2, t5
from task import UserError
from tasks import bert as masked
from tasks import classifier as labels
from tasks import gpt2 as next_token
from tasks import t5 as spans

BERT = bert.BERTConfig(11, 8, 2, 12, 20, 1, 3)
RNG = np.random.default_rng(0)
TOKENS, TARGETS = RNG.integers(11, size=(3, 6)), RNG.integers(11, size=(3, 4))
POSITIONS = np.array([[0, 4, 5, 2], [1, 2, 3, 0], [3, 5, 0, 1]])
MASK = np.arange(6) < np.array([[6], [3], [5]])


def gpt2_logits(model, batch):
    return model(batch["tokens"][:, :-1])


def t5_logits(model, batch):
    return model(batch["inputs"], jnp.pad(batch["targets"][:, :-1], ((0, 0), (1, 0))))


CASES = {
    "gpt2": (
        next_token.next_token_loss,
        lambda rngs: gpt2.GPT2(gpt2.GPT2Config(11, 8, 12, 1, 3), rngs=rngs),
        {"tokens": TOKENS},
        gpt2_logits,
        TOKENS[:, 1:],
    ),
    "bert": (
        masked.masked_token_loss,
        lambda rngs: bert.MaskedLM(BERT, rngs=rngs),
        {"tokens": TOKENS, "positions": POSITIONS, "targets": TARGETS},
        lambda model, batch: model(batch["tokens"], batch["positions"]),
        TARGETS,
    ),
    "t5": (
        spans.target_token_loss,
        lambda rngs: t5.T5(t5.T5Config(11, 12, 5, 16, 1, 1, 3), rngs=rngs),
        {"inputs": TOKENS, "targets": TARGETS},
        t5_logits,
        TARGETS,
    ),
    "classifier": (
        labels.label_loss,
        lambda rngs: classifier.Classifier(BERT, 11, "mean", rngs=rngs),
        {"tokens": TOKENS, "mask": MASK, "label": TARGETS[:, 0]},
        lambda model, batch: model(batch["tokens"], batch["mask"])[:, None],
        TARGETS[:, :1],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_losses_and_accuracies_are_over_rows_of_weight_one(name):
    loss_fn, make_model, batch, logits_of, targets = CASES[name]
    batch = {k: x if x.dtype == bool else x.astype(np.int32) for k, x in batch.items()}
    batch["weight"] = np.array([1, 0, 1], np.float32)
    model = nnx.jit(lambda: make_model(nnx.Rngs(0)))()
    means = nnx.jit(loss_fn)(model, batch)
    logits = np.asarray(nnx.jit(logits_of)(model, batch), np.float64)[::2]
    log_probabilities = scipy.special.log_softmax(logits, axis=-1)
    losses = -np.take_along_axis(log_probabilities, targets[::2, :, None], -1)
    assert means["loss"].count == losses.size
    assert means["loss"].total == pytest.approx(losses.sum(), rel=1e-5)
    assert ("accuracy" in means) == (name in ("bert", "classifier"))
    if "accuracy" in means:
        assert (
            float(means["accuracy"].total) == (logits.argmax(-1) == targets[::2]).sum()
        )
        assert means["accuracy"].count == losses.size


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (next_token, {"tokens": (1025,)}),
        (masked, {"tokens": (512,), "positions": (77,), "targets": (77,)}),
        (spans, {"inputs": (512,), "targets": (114,)}),
    ],
)
def test_blank_records_have_the_shapes_that_training_has(module, expected):
    task = module.make_task(module.ModelOptions(size="small"), None)
    shapes = pipeline.record_shapes(task)
    assert {name: x.shape for name, x in shapes.items()} == expected | {"weight": ()}


@pytest.mark.parametrize("module", [next_token, masked, spans])
def test_unknown_sizes_are_refused(module):
    with pytest.raises(UserError, match="--size huge: must be one of nano, tiny, "):
        module.make_task(module.ModelOptions(size="huge"), None)

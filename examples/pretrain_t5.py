r"""Pretrain T5 on real text with CAME.

    python examples/pretrain_t5.py

trains the tiny size (version 1.1) to fill gaps in the presidents' State of the Union
addresses, in three minutes on two CPU cores, and prints the cross-entropy of a bigram
model to compare with. The run's folder can then be loaded by Hugging Face's
`transformers`. On an accelerator:

    python examples/pretrain_t5.py --size base --text mine/*.txt \
        --batch-size 2048 --accumulate 8 --steps 100000
"""

import dataclasses

from pretraining.training.interrupts import quit_on_ctrl_c

with quit_on_ctrl_c(__name__ == "__main__"):  # Imports take seconds.
    import numpy as np
    from jax.typing import DTypeLike

    from pretraining import cli
    from pretraining.data import baselines, corpus, tokenization
    from pretraining.data.pipeline import Windows, blank
    from pretraining.data.span_corruption import END, SpanCorruption, unigram
    from pretraining.models import hugging_face, t5
    from pretraining.options import option, vocabulary_size
    from pretraining.task import Records, Task
    from pretraining.training import runs
    from pretraining.training.devices import compute_dtype
    from pretraining.training.optimizers import OptimizerOptions
    from pretraining.training.trainer import Trainer, TrainingOptions


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """Options for the model."""

    size: str = option("tiny", "of the model", choices=t5.SIZES)
    vocab_size: int | None = option(
        None,
        "tokens to learn, 100 sentinels included, from 12 million characters of the "
        "text at most (default: the size's own)",
        type=vocabulary_size,
    )


def without_text(
    model: ModelOptions, seq_len: int | None = None, dtype: DTypeLike | None = None
) -> tuple[Task, t5.T5Config]:
    """Span corruption of a blank record, computed in `dtype`."""
    config = t5.SIZES[model.size]
    config = dataclasses.replace(
        config,
        vocab_size=model.vocab_size or config.vocab_size,
        dtype=dtype or compute_dtype(),
    )
    inputs = seq_len or t5.INPUTS[model.size]
    corruption = SpanCorruption.of_learnt(config.vocab_size, inputs)
    records = blank(corruption.length, overlap=0)
    task = Task(
        name=f"T5 {model.size}",
        make_model=lambda rngs: t5.T5(config, rngs=rngs),
        loss_fn=t5.target_token_loss,
        train=records,
        validation=records,
        tokens_per_record=corruption.length,
        transform=corruption,
    )
    return task, config


def make_task(
    model: ModelOptions, text: corpus.TextOptions, seq_len: int | None = None
) -> Task:
    """Span corruption of the text, with a vocabulary learnt from it."""
    task, config = without_text(model, seq_len)
    tokenizer, *tokens = tokenization.learn_and_encode(
        text, unigram, config.vocab_size, END
    )
    corruption = SpanCorruption.of(tokenizer, seq_len or t5.INPUTS[model.size])
    train, validation = (Windows(part, corruption.length, overlap=0) for part in tokens)

    def targets(records: Records) -> np.ndarray:
        generator = np.random.default_rng(0)
        corrupted = (corruption(records[k], generator) for k in range(len(records)))
        return np.concatenate([record["targets"] for record in corrupted])

    return dataclasses.replace(
        task,
        train=train,
        validation=validation,
        transform=corruption,
        references=baselines.cross_entropies(
            targets(train), targets(validation), config.vocab_size
        ),
        options=dataclasses.asdict(model) | dataclasses.asdict(text),
        files={"tokenizer.json": tokenizer.to_str(pretty=True)},
    )


def main() -> None:
    model, text, optimizer, training, run = cli.parse(
        "pretrain_t5",
        __doc__,
        [ModelOptions, corpus.TextOptions, OptimizerOptions, TrainingOptions],
    )
    with runs.claim("pretrain_t5", run) as folder:
        task = make_task(model, text, training.seq_len)
        trainer = Trainer(task, optimizer, training, folder, resume=run.resume)
        result = trainer.run()
        hugging_face.save(folder, trainer.model)
        print(f"\n{result}")


if __name__ == "__main__":
    cli.run(main)

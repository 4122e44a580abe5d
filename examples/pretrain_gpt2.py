r"""Pretrain GPT-2 on real text with CAME.

    python examples/pretrain_gpt2.py

trains the tiny size on the presidents' State of the Union addresses on CPU,
and prints the cross-entropies of a unigram and a bigram model to compare with.
On two CPU cores it takes three minutes and ends at a validation loss of 2.68
(bigram 3.47). On an accelerator:

    python examples/pretrain_gpt2.py --size small --text mine/*.txt \
        --batch-size 480 --accumulate 4 --steps 50000
"""

import dataclasses

from pretraining.training.interrupts import quit_on_ctrl_c

with quit_on_ctrl_c(__name__ == "__main__"):  # Imports take seconds.
    from jax.typing import DTypeLike

    from pretraining import cli
    from pretraining.data import baselines, corpus, tokenization
    from pretraining.data.pipeline import Windows, blank
    from pretraining.models import gpt2, hugging_face, sampling
    from pretraining.options import option, utf8, vocabulary_size
    from pretraining.task import Task
    from pretraining.training import runs
    from pretraining.training.devices import compute_dtype
    from pretraining.training.optimizers import OptimizerOptions
    from pretraining.training.trainer import Trainer, TrainingOptions


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """Options for the model."""

    size: str = option("tiny", "of the model", choices=gpt2.SIZES)
    vocab_size: int | None = option(
        None,
        "tokens to learn, from 100 million characters of the text at most (default: "
        "the size's own)",
        type=vocabulary_size,
    )
    prompt: str = option("", "what the text sample at the end continues", type=utf8)


def without_text(
    model: ModelOptions, seq_len: int | None = None, dtype: DTypeLike | None = None
) -> tuple[Task, gpt2.GPT2Config]:
    """Next-token prediction on a blank record, computed in `dtype`."""
    config = gpt2.SIZES[model.size]
    length = seq_len or config.n_positions
    config = dataclasses.replace(
        config,
        vocab_size=model.vocab_size or config.vocab_size,
        n_positions=max(length, config.n_positions),
        dtype=dtype or compute_dtype(),
    )
    task = Task(
        name=f"GPT-2 {model.size}",
        make_model=lambda rngs: gpt2.GPT2(config, rngs=rngs),
        loss_fn=gpt2.next_token_loss,
        train=blank(length),
        validation=blank(length),
        tokens_per_record=length,
    )
    return task, config


def make_task(
    model: ModelOptions, text: corpus.TextOptions, seq_len: int | None = None
) -> Task:
    """Next-token prediction on the text, with a vocabulary learnt from it."""
    task, config = without_text(model, seq_len)
    length = task.tokens_per_record
    tokenizer, train, validation = tokenization.learn_and_encode(
        text, tokenization.byte_level_bpe, config.vocab_size, tokenization.END_OF_TEXT
    )
    sampling.check_prompt(tokenizer, model.prompt, length)
    return dataclasses.replace(
        task,
        train=Windows(train, length),
        validation=Windows(validation, length),
        references=baselines.cross_entropies(train, validation, config.vocab_size),
        options=dataclasses.asdict(model) | dataclasses.asdict(text),
        files={"tokenizer.json": tokenizer.to_str(pretty=True)},
    )


def main() -> None:
    model, text, optimizer, training, run = cli.parse(
        "pretrain_gpt2",
        __doc__,
        [ModelOptions, corpus.TextOptions, OptimizerOptions, TrainingOptions],
        defaults={"batch_size": 32},
    )
    with runs.claim("pretrain_gpt2", run) as folder:
        task = make_task(model, text, training.seq_len)
        trainer = Trainer(task, optimizer, training, folder, resume=run.resume)
        result = trainer.run()
        hugging_face.save(folder, trainer.model)
        sample = sampling.continue_text(
            trainer.model, task, model.prompt, training.seed
        )
        print(f"\nSample: {sample}\n\n{result}")


if __name__ == "__main__":
    cli.run(main)

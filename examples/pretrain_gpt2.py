r"""Pretrain GPT-2 on real text with CAME.

    python examples/pretrain_gpt2.py

trains the tiny size on the presidents' State of the Union addresses on CPU,
and prints the cross-entropies of a unigram and a bigram model to compare with.
On two CPU cores it takes three to five minutes and ends at a validation loss of 2.68
(bigram 3.47). On an accelerator:

    python examples/pretrain_gpt2.py --size small --text mine/*.txt \
        --batch-size 480 --accumulate 4 --steps 50000
"""

from data.corpus import TextOptions
from formats import hugging_face
from running import command_line, folder
from running.trainer import Trainer, TrainingOptions
from tasks.gpt2 import ModelOptions, continue_text, make_task
from training.optimizers import OptimizerOptions

NAME = "pretrain_gpt2"


def main() -> None:
    groups = [ModelOptions, TextOptions, OptimizerOptions, TrainingOptions]
    model, text, optimizer, training, run = command_line.parse(
        NAME, __doc__, groups, batch_size=32
    )
    with folder.claim(NAME, run) as path:
        task = make_task(model, text, training.seq_len)
        trainer = Trainer(task, optimizer, training, path, resume=run.resume)
        result = trainer.run()
        hugging_face.save(path, trainer.model)
        sample = continue_text(trainer.model, task, model.prompt, training.seed)
        print(f"\nSample: {sample}\n\n{result}")


if __name__ == "__main__":
    command_line.run(main)

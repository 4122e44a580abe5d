r"""Pretrain T5 on real text with CAME.

    python examples/pretrain_t5.py

trains the tiny size (version 1.1) to fill gaps in the presidents' State of the Union
addresses, in some minutes on two CPU cores, and prints the cross-entropy of a bigram
model to compare with. The run's folder can then be loaded by Hugging Face's
`transformers`. On an accelerator:

    python examples/pretrain_t5.py --size base --text mine/*.txt \
        --batch-size 2048 --accumulate 8 --steps 100000
"""

from data.corpus import TextOptions
from formats import hugging_face
from running import command_line, folder
from running.trainer import Trainer, TrainingOptions
from tasks.t5 import ModelOptions, make_task
from training.optimizers import OptimizerOptions

NAME = "pretrain_t5"


def main() -> None:
    groups = [ModelOptions, TextOptions, OptimizerOptions, TrainingOptions]
    model, text, optimizer, training, run = command_line.parse(NAME, __doc__, groups)
    with folder.claim(NAME, run) as path:
        task = make_task(model, text, training.seq_len)
        trainer = Trainer(task, optimizer, training, path, resume=run.resume)
        result = trainer.run()
        hugging_face.save(path, trainer.model)
        print(f"\n{result}")


if __name__ == "__main__":
    command_line.run(main)

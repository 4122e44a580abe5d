r"""Pretrain BERT on real text with CAME.

    python examples/pretrain_bert.py

trains the nano size to fill in masked pieces of words of the presidents' State of the
Union addresses. On two CPU cores it takes some minutes and ends at a validation loss of
1.78 (unigram 3.73), with 50 % of them right. The run's folder can then be fine-tuned
(finetune_classifier.py) or loaded by Hugging Face's `transformers`. On an accelerator:

    python examples/pretrain_bert.py --size large --text mine/*.txt --seq-len 128 \
        --batch-size 8192 --accumulate 16 --steps 20000 --learning-rate 5e-4
"""

from data.corpus import TextOptions
from formats import hugging_face
from running import command_line, folder
from running.trainer import Trainer, TrainingOptions
from tasks.bert import ModelOptions, make_task
from training.optimizers import OptimizerOptions

NAME = "pretrain_bert"


def main() -> None:
    groups = [ModelOptions, TextOptions, OptimizerOptions, TrainingOptions]
    model, text, optimizer, training, run = command_line.parse(
        NAME, __doc__, groups, batch_size=256, base_learning_rate=5e-3
    )
    with folder.claim(NAME, run) as path:
        task = make_task(model, text, training.seq_len)
        trainer = Trainer(task, optimizer, training, path, resume=run.resume)
        result = trainer.run()
        hugging_face.save(path, trainer.model)
        print(f"\n{result}")


if __name__ == "__main__":
    command_line.run(main)

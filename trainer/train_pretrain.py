"""Pretraining: a network that knows nothing reads text and learns to predict the next token.

For a document x_1 ... x_n the loss is the mean negative log-likelihood -1/n * sum_t log p(x_t |
x_<t), over all target tokens of an optimizer step, however they are spread over batch rows and
micro-batches (Bengio et al. 2003; Radford et al. 2018, eq. 1). Documents are packed into batch rows
of --max_seq_len tokens and do not see each other.

    python trainer/train_pretrain.py --max_steps 30 --save_weight try   # a minute on a CPU
    python trainer/train_pretrain.py --data_path zh.jsonl.xz en.jsonl.xz@0.5 --preset minimind-3 \\
        --batch_size 64
    python trainer/train_pretrain.py --data_path zh.jsonl.xz en.jsonl.xz@0.5 --preset minimind-3 \\
        --batch_size 64 --from_resume

What to expect: the loss starts at ln(6400) = 8.8 and falls below 4 within the first hundred steps,
while the network learns the commonest tokens and words; then it falls slowly. Held-out bits per
byte show the progress; docs/LOG.md has curves. The weights are in out/pretrain_<preset>/, a Hugging
Face folder that train_full_sft.py starts from.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trainer.runtime.arguments import arg, check_flags, command, parse_args
from trainer.runtime.stage_args import TrainArgs


@dataclass
class PretrainArgs(TrainArgs):
    data_path: list[str] = arg(
        [], 'rows {"text": "..."}; FILE@0.4: that fraction of them (default: see docs/training.md)'
    )
    save_weight: str = "pretrain"
    learning_rate: float = 2e-3


check_flags(PretrainArgs, __name__)  # --help need not wait for torch, which is imported below

from dataset.lm_dataset import PretrainDataset
from trainer.runtime.checkpoint import TrainState
from trainer.runtime.data import open_datasets, training_batches
from trainer.runtime.evaluation import validate
from trainer.runtime.loop import Loop
from trainer.runtime.optimizers import build_optimizer, learning_rate_at, set_learning_rate
from trainer.runtime.run import Run
from trainer.runtime.weights import load_model


def main(argv: list[str] | None = None) -> None:
    args = parse_args(PretrainArgs, argv)
    with Run(args) as run:
        model, tokenizer = load_model(run, chat=False)
        train_set, val_sets = open_datasets(
            run, tokenizer, PretrainDataset, ["pretrain_train.jsonl"]
        )
        optimizer = build_optimizer(model, args)
        batches = training_batches(run, train_set, tokenizer.pad_token_id)
        state = TrainState(model, tokenizer, optimizer, train_set.fingerprint)
        loop = Loop(run, state, batches, partial(validate, run, model, tokenizer, val_sets))

        for step, micro_batches in loop:
            learning_rate = learning_rate_at(step, len(batches), args)
            set_learning_rate(optimizer, loop.learning_rate_factor * learning_rate)
            # each loss is a part of the step's mean: its sum / the targets of all micro-batches and
            # ranks; the parts add up
            num_targets = run.count_targets(micro_batches)
            for micro in micro_batches:
                with run.micro_step(is_last=micro is micro_batches[-1]):
                    loss = loop.net(
                        **run.to_device(micro),
                        num_items_in_batch=num_targets,
                        head_positions="targets",
                    ).loss
                    run.backward(loss)
                loop.means.add(loss=loss)
            metrics = loop.means.reduce(run.ranks)
            update = run.clip_and_step(model, optimizer, metrics["loss"])
            loop.log(update, micro_batches, num_targets, **metrics)  # validates, saves when due


if __name__ == "__main__":
    command(main)

"""Supervised fine-tuning: the pretrained network learns from conversations to answer.

The loss is that of pretraining, -log p(token | tokens before it), summed over the assistant's
tokens alone, the end token of each turn among them, and divided by their number in the optimizer
step (Ouyang et al. 2022, section 3.5; masked as in Zhou et al. 2023). The chat template says which
tokens are the assistant's, not a search for special tokens, so no user's text is ever trained on.

    python trainer/train_full_sft.py --max_steps 30 --from_weight none --save_weight try
    python trainer/train_full_sft.py --data_path chat_zh.jsonl.xz chat_en.jsonl.xz \\
        --preset minimind-3 --batch_size 64
    python trainer/train_full_sft.py --data_path my_shop.jsonl --from_weight out/full_sft_tiny \\
        --save_weight shop

What to expect: the loss begins well below pretraining's start, since the words are known, and falls
quickly. After more than a few epochs watch the held-out bits per byte for overfitting.
--empty_think_ratio teaches answers without reasoning after an empty think block,
--system_prompt_ratio to follow system prompts. The weights are in out/full_sft_<preset>/: chat with
eval_llm.py.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trainer.runtime.arguments import arg, check_flags, check_ratio, command, parse_args
from trainer.runtime.stage_args import ConversationArgs


@dataclass
class SFTArgs(ConversationArgs):
    data_path: list[str] = arg(
        [], "rows of conversations; FILE@0.4: that fraction of them (default: see docs/training.md)"
    )
    from_weight: str = "pretrain"
    save_weight: str = "full_sft"
    learning_rate: float = 1e-3
    system_prompt_ratio: float = arg(
        0.0,
        "fraction of the rows without a system message that get one",
        aliases=("system_prompt_share",),
    )
    empty_think_ratio: float = arg(
        0.0,
        "fraction of the answers without reasoning that get an empty think block",
        aliases=("empty_think_share",),
    )

    def check(self) -> None:
        """ConversationArgs.check, and the two ratios."""
        super().check()
        check_ratio(self, "system_prompt_ratio", "empty_think_ratio")


check_flags(SFTArgs, __name__)  # --help need not wait for torch, which is imported below

from dataset.lm_dataset import SFTDataset
from trainer.runtime.checkpoint import TrainState
from trainer.runtime.data import open_datasets, training_batches
from trainer.runtime.evaluation import validate
from trainer.runtime.loop import Loop
from trainer.runtime.optimizers import build_optimizer, learning_rate_at, set_learning_rate
from trainer.runtime.run import Run
from trainer.runtime.weights import load_model


def main(argv: list[str] | None = None) -> None:
    args = parse_args(SFTArgs, argv)
    with Run(args) as run:
        model, tokenizer = load_model(run)
        train_set, val_sets = open_datasets(
            run,
            tokenizer,
            SFTDataset,
            ["sft_train.jsonl"],
            seed=args.seed,
            system_prompt_ratio=args.system_prompt_ratio,
            empty_think_ratio=args.empty_think_ratio,
            **args.turn_options(),
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

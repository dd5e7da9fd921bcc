"""Reasoning distillation: from a larger model's text the network learns to reason first.

Fine-tuning on rows with `reasoning_content`, which a large model wrote and somebody checked
(DeepSeek-AI 2025, "R1", section 2.4): for small networks that does more than reinforcement learning
of their own. The reasoning stands between <think> and </think> and is trained on like the answer.
With y the assistant's tokens and x the tokens before them,

    loss = sum_t w_t * -log p(y_t | x, y_<t) / sum_t w_t

where w_t is --think_token_weight for <think> and </think>, else 1, and both sums are over the whole
optimizer step. --direct_ratio of the rows are trained without their reasoning, after the empty
think block that the chat template writes when it is told not to think, and so are rows that have
none. So one model does both, by the template's switch; left to itself, it reasons.

    python trainer/train_reason.py --save_dir out/quickstart --batch_size 3 --epochs 4 \\
        --learning_rate 1e-3                                # a minute or two, after the quick start
    python trainer/train_reason.py --data_path r1_traces.jsonl chat.jsonl@0.2 --max_seq_len 2048 \\
        --gradient_checkpointing
    python trainer/train_reason.py --direct_ratio 0 --think_token_weight 10     # always reasons
    python eval_llm.py --weight reason --save_dir out/quickstart --benchmark toy --open_thinking 1

What to expect: the format comes within a hundred steps; each validation says how many greedy
completions keep to it (`val_format/thinking`, `val_format/direct`). With thinking on, the model
answers far more questions of several steps (sums, dates, word problems) than with thinking off: 80
against 28% in scripts/evaluate_stages.py. Skills that are not among the rows are forgotten: add
rows of the stage before.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trainer.runtime.arguments import (
    arg,
    check_flags,
    check_not_negative,
    check_positive,
    check_ratio,
    command,
    parse_args,
)
from trainer.runtime.stage_args import ConversationArgs


@dataclass
class ReasonArgs(ConversationArgs):
    data_path: list[str] = arg(
        [], "rows of conversations; FILE@0.4: that fraction of them (default: see docs/training.md)"
    )
    from_weight: str = "full_sft"
    save_weight: str = "reason"
    learning_rate: float = 5e-4
    val_ratio: float = arg(0.03, "fraction of the documents held out for validation; 0: none")
    think_token_weight: float = arg(
        1.0, "weight of <think> and </think> in the loss", aliases=("mark_weight",)
    )
    direct_ratio: float = arg(
        0.3,
        "fraction of the rows with reasoning that are trained without it, as direct answers",
        aliases=("direct_share",),
    )
    empty_think_ratio: float = arg(
        1.0,
        "fraction of the rows without reasoning that are trained as direct answers",
        aliases=("empty_think_share",),
    )
    format_prompts: int = arg(
        32,
        "held-out prompts that a validation completes to see whether the format is kept; 0: none",
    )
    format_tokens: int = arg(256, "longest of these completions, in tokens")

    def check(self) -> None:
        """ConversationArgs.check, and the stage's own flags."""
        super().check()
        check_positive(self, "think_token_weight", "format_tokens")
        check_not_negative(self, "format_prompts")
        check_ratio(self, "direct_ratio", "empty_think_ratio")


check_flags(ReasonArgs, __name__)  # --help need not wait for torch, which is imported below

import torch
import torch.nn.functional as F

from dataset.lm_dataset import ReasonDataset
from dataset.packing import IGNORE
from trainer.runtime.checkpoint import TrainState
from trainer.runtime.data import open_datasets, training_batches
from trainer.runtime.evaluation import validate
from trainer.runtime.loop import Loop
from trainer.runtime.optimizers import build_optimizer, learning_rate_at, set_learning_rate
from trainer.runtime.run import Run
from trainer.runtime.think_format import bare_prompts, format_ratios, think_ids
from trainer.runtime.weights import load_model


def weighted_nll(
    logits: torch.Tensor, targets: torch.Tensor, think_tokens: torch.Tensor, weight: float
) -> torch.Tensor:
    """sum_t w_t * -log p(y_t) over logits [n, V] and their targets [n]: a scalar."""
    nll = F.cross_entropy(logits.float(), targets, reduction="none")
    return (nll * torch.isin(targets, think_tokens).mul(weight - 1).add(1)).sum()


def main(argv: list[str] | None = None) -> None:
    args = parse_args(ReasonArgs, argv)
    with Run(args) as run:
        model, tokenizer = load_model(run)
        train_set, val_sets = open_datasets(
            run,
            tokenizer,
            ReasonDataset,
            ["reason_train.jsonl"],
            seed=args.seed,
            direct_ratio=args.direct_ratio,
            empty_think_ratio=args.empty_think_ratio,
            **args.turn_options(),
        )
        prompts = bare_prompts(list(val_sets.values()), tokenizer, args.format_prompts)
        optimizer = build_optimizer(model, args)
        batches = training_batches(run, train_set, tokenizer.pad_token_id)
        think_tokens = torch.tensor(think_ids(tokenizer), device=run.device)

        def evaluate(index: int) -> tuple[dict[str, float], str]:
            scores, text = validate(run, model, tokenizer, val_sets, index)
            if prompts:
                ratios = format_ratios(run, model, tokenizer, prompts, args.format_tokens)
                scores |= ratios
                text += "\nformat kept: {:.0%} thinking, {:.0%} direct".format(*ratios.values())
            return scores, text

        state = TrainState(model, tokenizer, optimizer, train_set.fingerprint)
        loop = Loop(run, state, batches, evaluate)

        for step, micro_batches in loop:
            learning_rate = learning_rate_at(step, len(batches), args)
            set_learning_rate(optimizer, loop.learning_rate_factor * learning_rate)
            # the loss is divided by the weights of the whole step: all micro-batches, all ranks
            num_targets = run.count_targets(micro_batches)
            num_think_tokens = run.sum(
                sum(int(torch.isin(x["labels"], think_tokens.cpu()).sum()) for x in micro_batches)
            )
            total_weight = num_targets + (args.think_token_weight - 1) * num_think_tokens
            for micro in micro_batches:
                batch = run.to_device(micro)
                targets = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE)  # B T
                is_target = targets != IGNORE
                where = "targets" if args.think_token_weight == 1 else is_target
                with run.micro_step(is_last=micro is micro_batches[-1]):
                    out = loop.net(**batch, num_items_in_batch=num_targets, head_positions=where)
                    loss = out.loss  # with equal weights the network's own, else its balance loss
                    if args.think_token_weight != 1:
                        weights = think_tokens, args.think_token_weight
                        nll = weighted_nll(out.logits, targets[is_target], *weights)
                        loss = loss + nll / total_weight
                    run.backward(loss)
                loop.means.add(loss=loss)
            metrics = loop.means.reduce(run.ranks)
            update = run.clip_and_step(model, optimizer, metrics["loss"])
            loop.log(update, micro_batches, num_targets, **metrics)  # validates, saves when due


if __name__ == "__main__":
    command(main)

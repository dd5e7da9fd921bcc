"""A reward model: from pairs of completions, one number that says how good a completion is.

A single number replaces the network's head, read at the last token of a conversation: the reward r.
If people prefer one completion to another with the probability sigmoid(r_chosen - r_rejected)
(Bradley & Terry 1952), the loss is the negative log-likelihood of their preferences (Ouyang et al.
2022, eq. 1),

    -log sigmoid(r_chosen - r_rejected),

the mean over the pairs of an optimizer step. It does not fix where 0 is:
--center_rewards_coefficient adds (r_chosen + r_rejected)^2, which keeps the rewards around it
(Eisenstein et al. 2023, eq. 2). Pairs are those of train_dpo.py, and both completions share the
computation of their prompt; pairs that are too long are left out, since a reward is one of a whole
completion.

    python trainer/train_reward.py --save_dir out/quickstart --max_seq_len 256 --batch_size 4 \\
        --epochs 3 --learning_rate 5e-4 --warmup_ratio 0.1   # a minute, after the quick start
    python trainer/train_reward.py --data_path pairs.jsonl.xz --batch_size 16 \\
        --center_rewards_coefficient 0.01
    python trainer/train_reward.py --data_path pairs.jsonl.xz --from_weight dpo --save_weight judge

What to expect: the loss begins near ln 2 = 0.693 and falls; the fraction of held-out pairs whose
chosen completion gets the higher reward rises from one half, to 91% with the 6,000 pairs of
scripts/evaluate_stages.py. The folder is a standard sequence classifier, which
AutoModelForSequenceClassification loads.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trainer.runtime.arguments import arg, check_flags, check_not_negative, command, parse_args
from trainer.runtime.stage_args import TrainArgs


@dataclass
class RewardArgs(TrainArgs):
    data_path: list[str] = arg(
        [], "rows of pairs; FILE@0.4: that fraction of them (default: see docs/training.md)"
    )
    from_weight: str = "full_sft"
    save_weight: str = "reward"
    max_seq_len: int = arg(1024, "tokens of a batch row: longer pairs, prompt once, are left out")
    learning_rate: float = 1e-4
    weight_decay: float = 0.0
    val_ratio: float = arg(0.05, "fraction of the prompts held out for validation; 0: none")
    center_rewards_coefficient: float = arg(
        0.0,
        "coefficient of (chosen + rejected reward)^2 in the loss, such as 0.01",
        aliases=("center_weight",),
    )

    def check(self) -> None:
        """TrainArgs.check, the coefficient, and no dropout."""
        super().check()
        check_not_negative(self, "center_rewards_coefficient")
        if self.dropout:
            raise ValueError(
                "--dropout would add different noise to the two rewards that are compared: leave "
                "it out"
            )


check_flags(RewardArgs, __name__)  # --help need not wait for torch, which is imported below

import torch

from dataset.pair_dataset import PairBatches, PairDataset, tree_mask
from model.reward_model import MiniMindForSequenceClassification
from trainer.losses.preference import bradley_terry_loss
from trainer.runtime.checkpoint import TrainState
from trainer.runtime.data import open_datasets, training_batches
from trainer.runtime.loop import Loop
from trainer.runtime.optimizers import build_optimizer, learning_rate_at, set_learning_rate
from trainer.runtime.pairs import note_pairs, validate_pairs, with_margin
from trainer.runtime.run import Run
from trainer.runtime.weights import load_model


def pair_rewards(
    net: torch.nn.Module, batch: dict[str, torch.Tensor], num_rewards: float = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rewards of all pairs, float32 [N, 2], the balance loss) of a `collate_trees` batch.

    num_rewards: of the whole step. The balance loss is 0 unless the network is a mixture of
    experts.
    """
    out = net(
        batch["input_ids"],
        attention_mask=tree_mask(batch["tree"], batch["branch"]),
        position_ids=batch["position_ids"],
        head_positions=batch["is_end"],
        num_items_in_batch=num_rewards,
    )
    return out.logits.float().view(-1, 2), out.loss


def main(argv: list[str] | None = None) -> None:
    args = parse_args(RewardArgs, argv)
    with Run(args) as run:
        language_model, tokenizer = load_model(run)
        model = MiniMindForSequenceClassification.from_causal_lm(language_model)
        train_set, val_sets = open_datasets(
            run, tokenizer, PairDataset, ["dpo_train.jsonl"], "dpo_heldout.jsonl", whole=True
        )
        optimizer = build_optimizer(model, args)
        pad_id, coefficient = tokenizer.pad_token_id, args.center_rewards_coefficient
        batches = training_batches(run, train_set, pad_id, PairBatches)

        def score(dataset, micro_batches, means):
            for micro in micro_batches:
                rewards, _ = pair_rewards(model, run.to_device(micro))
                note_pairs(means, bradley_terry_loss(*rewards.unbind(1), coefficient), rewards)

        def evaluate(index):
            return validate_pairs(run, model, tokenizer, val_sets, index, score)

        state = TrainState(model, tokenizer, optimizer, train_set.fingerprint)
        loop = Loop(run, state, batches, evaluate, evaluate_first=True)

        for step, micro_batches in loop:
            learning_rate = learning_rate_at(step, len(batches), args)
            set_learning_rate(optimizer, loop.learning_rate_factor * learning_rate)
            # the loss is a mean over the pairs of the whole step: all micro-batches, all ranks
            num_pairs = run.sum(sum(len(micro["items"]) for micro in micro_batches))
            for micro in micro_batches:
                with run.micro_step(is_last=micro is micro_batches[-1]):
                    rewards, balance_loss = pair_rewards(
                        loop.net, run.to_device(micro), 2 * num_pairs
                    )
                    losses = bradley_terry_loss(*rewards.unbind(1), coefficient)
                    run.backward(losses.sum() / num_pairs + balance_loss)
                note_pairs(loop.means, losses, rewards)
                # the positions that were trained on, for the record
                micro["labels"] = micro["input_ids"].masked_fill(~micro["is_end"], -100)
            metrics = with_margin(loop.means.reduce(run.ranks))
            update = run.clip_and_step(model, optimizer, metrics["loss"])
            loop.log(update, micro_batches, 2 * num_pairs, **metrics)  # validates, saves when due


if __name__ == "__main__":
    command(main)

"""Learning from preferences: of two completions of a prompt, prefer the one that people prefer.

DPO (Rafailov et al. 2023, eq. 7) needs neither a reward model nor sampling. With a reference, the
frozen network that training starts from, the loss of a chosen completion w and a rejected one l is

    -log sigmoid(beta * [(log p(w) - log p_ref(w)) - (log p(l) - log p_ref(l))])

and beta * (log p - log p_ref) is its reward. --loss_type takes others of the family, whose
equations are in losses/preference.py: robust (some pairs are swapped), ipo (a margin that is not
exceeded), kto (also single completions that are good or bad), and, without a reference, simpo and
orpo. The loss is the mean over the pairs (kto: completions) of an optimizer step. The completions
of a pair share the computation of their prompt.

    python trainer/train_dpo.py --save_dir out/quickstart --max_seq_len 256 --batch_size 4 \\
        --epochs 2 --learning_rate 1e-4 --sft_weight 1        # a minute, after the quick start
    python trainer/train_dpo.py --data_path pairs.jsonl.xz --batch_size 16 --sft_weight 0.2
    python trainer/train_dpo.py --data_path thumbs.jsonl --loss_type kto --undesirable_weight 1.3

What to expect: the loss begins at ln 2 = 0.693 and falls; on held-out pairs rewards/accuracies
rises from one half and log_probs/accuracies, the fraction of pairs whose chosen completion is more
probable, from 95 to 99.7% in scripts/evaluate_stages.py, where completions that are right and
polite rise from 68 to 99%. log_probs/chosen often falls too; where it falls far, other skills
suffer, and --sft_weight holds it. A learning rate that is too low teaches nothing: the run says so.
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
    command,
    parse_args,
)
from trainer.runtime.stage_args import TrainArgs

FLAGS = {  # of each loss, besides --beta
    "sigmoid": {"reference", "sft_weight", "label_smoothing"},
    "robust": {"reference", "sft_weight", "label_smoothing"},
    "ipo": {"reference", "sft_weight"},
    "kto": {"reference", "desirable_weight", "undesirable_weight"},
    "simpo": {"sft_weight", "gamma"},
    "orpo": set(),
}


@dataclass
class DPOArgs(TrainArgs):
    data_path: list[str] = arg(
        [], "rows of pairs; FILE@0.4: that fraction of them (default: see docs/training.md)"
    )
    from_weight: str = "full_sft"
    save_weight: str = "dpo"
    max_seq_len: int = arg(1024, "tokens of a batch row: a longer pair, prompt once, is cut")
    learning_rate: float = 2e-5
    weight_decay: float = 0.0
    val_ratio: float = arg(0.05, "fraction of the prompts held out for validation; 0: none")
    loss_type: str = arg("sigmoid", "of a pair; sigmoid: DPO", [*FLAGS], aliases=("pref_loss",))
    beta: float | None = arg(
        None, "larger: closer to the reference (default: 0.1; simpo: 2)", aliases=("pref_beta",)
    )
    label_smoothing: float = arg(
        0.0, "sigmoid, robust: fraction of swapped pairs", aliases=("dpo_label_smoothing",)
    )
    gamma: float = arg(1.0, "simpo: the margin to reach", aliases=("simpo_gamma",))
    desirable_weight: float = arg(
        1.0, "kto: weight of the desirable completions", aliases=("kto_chosen_weight",)
    )
    undesirable_weight: float = arg(1.0, "kto: of the others", aliases=("kto_rejected_weight",))
    sft_weight: float = arg(
        0.0,
        "weight of -log p per token of the chosen completion (Pang et al. 2024, eq. 1)",
        aliases=("rpo_alpha", "pref_ftx"),
    )
    reference: str = arg(
        "cached",
        "log-probabilities of the reference: computed once and kept in --cache_dir, or in each "
        "step by a second network in memory",
        choices=["cached", "on_the_fly"],
    )

    # --from_weight names the reference
    FREE = tuple(name for name in TrainArgs.FREE if name != "from_weight")

    def check(self) -> None:
        """TrainArgs.check; the ranges of this stage's flags, and flags without effect."""
        super().check()
        check_positive(self, "beta")
        check_not_negative(self, "gamma", "desirable_weight", "undesirable_weight", "sft_weight")
        if unused := sorted(self.given & set().union(*FLAGS.values()) - FLAGS[self.loss_type]):
            flags = ", ".join(f"--{name}" for name in unused)
            raise ValueError(
                f"--loss_type {self.loss_type} does not use {flags}: leave that out, or choose "
                "another loss"
            )
        is_missing = self.loss_type == "robust" and not self.label_smoothing
        if not 0 <= self.label_smoothing < 0.5 or is_missing:
            raise ValueError(
                f"--label_smoothing {self.label_smoothing}: give a fraction below 0.5, where pairs "
                "teach nothing; --loss_type robust needs one above 0"
            )
        if self.dropout:
            raise ValueError(
                "--dropout would add noise to the log-probabilities that are compared: leave it out"
            )
        if self.from_weight == "none" and self.has_reference:
            raise ValueError(
                f"--from_weight none with --loss_type {self.loss_type}, which compares with the "
                "network that training starts from: give one that can answer, or choose simpo or "
                "orpo"
            )
        self.beta = self.beta or (2.0 if self.loss_type == "simpo" else 0.1)

    @property
    def has_reference(self) -> bool:
        return "reference" in FLAGS[self.loss_type]


check_flags(DPOArgs, __name__)  # --help need not wait for torch, which is imported below

import torch

from dataset.files.hashes import fingerprint
from dataset.pair_dataset import PairBatches, PairDataset
from trainer.losses.preference import pair_losses
from trainer.runtime import pairs
from trainer.runtime.checkpoint import TrainState
from trainer.runtime.data import open_datasets, training_batches
from trainer.runtime.loop import Loop
from trainer.runtime.optimizers import build_optimizer, learning_rate_at, set_learning_rate
from trainer.runtime.run import Run
from trainer.runtime.weights import load_model


def main(argv: list[str] | None = None) -> None:
    args = parse_args(DPOArgs, argv)
    with Run(args) as run:
        model, tokenizer = load_model(run)
        is_kto, pad_id = args.loss_type == "kto", tokenizer.pad_token_id
        train_set, val_sets = open_datasets(
            run, tokenizer, PairDataset, ["dpo_train.jsonl"], "dpo_heldout.jsonl", unpaired=is_kto
        )
        reference, data = None, train_set.fingerprint
        if args.has_reference:
            reference = pairs.Reference(run, model, [train_set, *val_sets.values()], pad_id)
            data = fingerprint(data=data, reference=reference.name)
        optimizer = build_optimizer(model, args)
        batches = training_batches(run, train_set, pad_id, PairBatches)

        def losses_and_rewards(dataset, policy, batch, kl):
            ref = reference(dataset, batch) if reference else None
            return pair_losses(args, policy, ref, batch["lengths"], kl)

        def score(dataset, micro_batches, means):  # of held-out pairs
            kl = reference.estimate_kl(model, dataset, micro_batches) if is_kto else 0.0
            for batch in map(run.to_device, micro_batches):
                policy, _ = pairs.log_probs(model, batch)
                losses, rewards = losses_and_rewards(dataset, policy, batch, kl)
                pairs.note_pairs(means, losses, rewards, policy, batch["lengths"], is_kto)

        def evaluate(index):
            return pairs.validate_pairs(run, model, tokenizer, val_sets, index, score)

        state = TrainState(model, tokenizer, optimizer, data)
        loop = Loop(run, state, batches, evaluate, evaluate_first=True)
        stuck = pairs.StuckWarning(len(batches), args.learning_rate)

        for step, micro_batches in loop:
            learning_rate = learning_rate_at(step, len(batches), args)
            set_learning_rate(optimizer, loop.learning_rate_factor * learning_rate)
            # the loss is a mean over the pairs (kto: completions) of the whole step, all ranks
            lengths = torch.cat([micro["lengths"] for micro in micro_batches])
            num_losses = run.sum((lengths > 0).sum() if is_kto else len(lengths))
            num_targets = run.count_targets(micro_batches)
            kl = reference.estimate_kl(model, train_set, micro_batches) if is_kto else 0.0
            for micro in micro_batches:
                batch = run.to_device(micro)
                with run.micro_step(is_last=micro is micro_batches[-1]):
                    policy, balance_loss = pairs.log_probs(loop.net, batch, num_targets)
                    losses, rewards = losses_and_rewards(train_set, policy, batch, kl)
                    run.backward(losses.sum() / num_losses + balance_loss)
                pairs.note_pairs(loop.means, losses, rewards, policy, batch["lengths"], is_kto)
            metrics = pairs.with_margin(loop.means.reduce(run.ranks))
            if is_kto:
                metrics["kl"] = kl
            update = run.clip_and_step(model, optimizer, metrics["loss"])
            loop.log(update, micro_batches, num_targets, **metrics)  # validates, saves when due
            if reference and (text := stuck.after(step + 1, metrics.get("rewards/margins"))):
                loop.record.print0(text)


if __name__ == "__main__":
    command(main)

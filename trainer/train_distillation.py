"""Distillation: a small student learns from all probabilities of a teacher, not only from the data.

At each target token t the loss is (1 - alpha) * -log q(t) + alpha * D(p, q), with the student's
distribution q and the teacher's p, divided by the number of targets of the step: the tokens that
the teacher takes for nearly as probable say more than one token does (Hinton et al. 2015, eq. 4
ff.). --divergence chooses D (losses/distillation.py). With --on_policy_ratio S, that fraction of
the rows has its last completion replaced by one that the student samples now, and the teacher
corrects it token by token (Agarwal et al. 2024, algorithm 1; without cross entropy there).

    python trainer/train_distillation.py --teacher out/quickstart/full_sft_tiny --hidden_size 96 \\
        --num_hidden_layers 3 --optimizer muon --batch_size 1 --alpha 1    # a minute or two
    python trainer/train_distillation.py --teacher full_sft_minimind2 --preset minimind2-small \\
        --data_path my.jsonl
    python trainer/train_distillation.py --teacher out/quickstart/full_sft_tiny \\
        --from_weight out/distillation_96x3 --save_weight on_policy --on_policy_ratio 0.5 \\
        --divergence jsd --alpha 1

A teacher of another tokenizer, or one behind a server, teaches by its completions
(scripts/make_teacher_rows.py; Kim & Rush 2016).

What to expect: held-out bits per byte below those of the same network trained on the same rows
alone, where rows are few: by 14% in scripts/evaluate_stages.py, at the same accuracy.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from model.presets import PRESETS
from trainer.runtime.arguments import (
    arg,
    check_flags,
    check_positive,
    check_ratio,
    command,
    parse_args,
)
from trainer.runtime.stage_args import ConversationArgs, deepspeed_stage


@dataclass
class DistillationArgs(ConversationArgs):
    data_path: list[str] = arg(
        [], "rows of conversations; FILE@0.4: that fraction of them (default: see docs/training.md)"
    )
    from_weight: str = arg(
        "none",
        "the student: a run's name, checkpoint folder, .pth file, or none: from the preset",
        aliases=("from_student_weight",),
    )
    hidden_size: int | None = arg(
        None, "width of the student, instead of the preset's", aliases=("student_hidden_size",)
    )
    num_hidden_layers: int | None = arg(
        None, "its layers, instead of the preset's", aliases=("student_num_layers",)
    )
    use_moe: bool = arg(
        False, "the student is a mixture of 4 experts", aliases=("student_use_moe",)
    )
    save_weight: str = "distillation"
    learning_rate: float = 2e-3
    teacher: str = arg(
        "full_sft",
        "learn from this run (a name in SAVE_DIR), checkpoint folder or .pth file",
        aliases=("teacher_model_name_or_path", "from_teacher_weight"),
    )
    teacher_preset: str = arg(
        "", "which of the runs of that name: its shape", choices=list(PRESETS)
    )
    teacher_hidden_size: int | None = arg(None, "which of the runs of that name: its width")
    teacher_num_hidden_layers: int | None = arg(
        None, "which of the runs of that name: its layers", aliases=("teacher_num_layers",)
    )
    teacher_use_moe: bool = arg(False, "which of the runs of that name: the mixture of experts")
    divergence: str = arg(
        "forward_kl",
        "of the student's distribution from the teacher's",
        choices=["forward_kl", "reverse_kl", "jsd"],
    )
    jsd_beta: float = arg(0.5, "jsd: fraction of the teacher in the mixture m; 0: KL(p, q)")
    temperature: float = arg(1.0, "divides both logits: above 1, improbable tokens dominate")
    alpha: float = arg(0.9, "weight of the divergence; the cross entropy has 1 - alpha")
    on_policy_ratio: float = arg(
        0.0,
        "fraction of the rows whose last completion the student samples, in each step",
        aliases=("on_policy_share", "lmbda"),
    )
    max_completion_length: int = arg(
        128, "longest of these completions, in tokens", aliases=("max_new_tokens",)
    )
    chunk_size: int = arg(1024, "target positions whose logits are in memory at a time")

    FREE = (*ConversationArgs.FREE, "chunk_size")

    def check(self) -> None:
        """ConversationArgs.check; the ranges of this stage's flags, and those without effect."""
        super().check()
        shape = ("teacher_hidden_size", "teacher_num_hidden_layers")
        check_positive(self, "temperature", "max_completion_length", "chunk_size", *shape)
        check_ratio(self, "jsd_beta", "alpha", "on_policy_ratio")
        if "jsd_beta" in self.given and self.divergence != "jsd":
            raise ValueError("--jsd_beta has no effect without --divergence jsd: leave it out")
        if "max_completion_length" in self.given and not self.on_policy_ratio:
            raise ValueError("--max_completion_length: give --on_policy_ratio too, or leave it out")
        if self.on_policy_ratio and not self.alpha:
            raise ValueError("--on_policy_ratio with --alpha 0 teaches nothing: raise --alpha")
        if self.deepspeed and deepspeed_stage(self.deepspeed) == 3:
            raise ValueError(f"--deepspeed {self.deepspeed}: ZeRO stage 3; take ds_zero2.json")


check_flags(DistillationArgs, __name__)  # --help need not wait for torch, imported below

import torch

from dataset.files.hashes import fingerprint
from dataset.lm_dataset import SFTDataset
from dataset.packing import IGNORE
from model.native_format import network_sha256
from trainer.losses.distillation import distillation_sums, next_tokens
from trainer.runtime.checkpoint import TrainState
from trainer.runtime.data import open_datasets, training_batches
from trainer.runtime.evaluation import bits_per_byte, validate
from trainer.runtime.loop import Loop
from trainer.runtime.optimizers import build_optimizer, learning_rate_at, set_learning_rate
from trainer.runtime.run import Run
from trainer.runtime.teacher import OnPolicyCompletions, load_teacher
from trainer.runtime.weights import load_model


def main(argv: list[str] | None = None) -> None:
    args = parse_args(DistillationArgs, argv)
    with Run(args) as run:
        model, tokenizer = load_model(run)
        teacher = load_teacher(args, tokenizer, run.device)
        teacher_name = run.ranks.from_main(lambda: network_sha256(teacher))
        train_set, val_sets = open_datasets(
            run, tokenizer, SFTDataset, ["sft_train.jsonl"], seed=args.seed, **args.turn_options()
        )
        optimizer = build_optimizer(model, args)
        batches = training_batches(run, train_set, tokenizer.pad_token_id)
        beta = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": args.jsd_beta}[args.divergence]
        heads, options = (model.lm_head, teacher.lm_head), (args.temperature, args.chunk_size)
        teacher_scores: dict[str, float] = {}

        def evaluate(index: int) -> tuple[dict[str, float], str]:
            scores, text = validate(run, model, tokenizer, val_sets, index)
            return scores | teacher_scores, text

        data = fingerprint(data=train_set.fingerprint, teacher=teacher_name)
        loop = Loop(run, TrainState(model, tokenizer, optimizer, data), batches, evaluate)
        for name, x in val_sets.items():
            score = bits_per_byte(teacher, tokenizer, x, run, args.max_seq_len, args.batch_size)
            teacher_scores[f"val_bpb/{name}_teacher"] = score["bpb"]
            run.print0(f"teacher: {name} {score['bpb']:.4f} bits per byte")
        on_policy = OnPolicyCompletions(run, model, tokenizer) if args.on_policy_ratio else None

        for step, micro_batches in loop:
            learning_rate = learning_rate_at(step, len(batches), args)
            set_learning_rate(optimizer, loop.learning_rate_factor * learning_rate)
            if on_policy:
                micro_batches = on_policy.replace_some(micro_batches, step)
            # each loss is its sum / the targets of all micro-batches and ranks: the parts add up
            num_targets = run.count_targets(micro_batches)
            for micro in micro_batches:
                batch = run.to_device(micro)
                ids = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
                is_target = next_tokens(batch["labels"]) != IGNORE  # B T
                data_tokens = next_tokens(batch.get("data_labels", batch["labels"]))[is_target]
                with run.micro_step(is_last=micro is micro_batches[-1]):
                    # the body runs here, the head in chunks, on the targets alone
                    out = loop.net(
                        **ids,
                        labels=batch["labels"],
                        num_items_in_batch=num_targets,
                        head_positions="none",
                    )
                    with torch.no_grad():
                        teacher_hidden = teacher.model(**ids).last_hidden_state
                    hidden = out.hidden_states[-1][is_target], teacher_hidden[is_target]
                    divergence, nll = distillation_sums(
                        *hidden, data_tokens, *heads, beta, *options
                    )
                    mixed = args.alpha * divergence + (1 - args.alpha) * nll
                    loss = mixed / num_targets + out.loss  # of a mixture: its balance loss
                    run.backward(loss)
                num_data = (data_tokens != IGNORE).sum()
                loop.means.add(loss=loss, kd_loss=divergence / num_targets)
                loop.means.add(num_data, ce_loss=nll)
            metrics = loop.means.reduce(run.ranks)
            update = run.clip_and_step(model, optimizer, metrics["loss"])
            loop.log(update, micro_batches, num_targets, **metrics)  # validates, saves when due


if __name__ == "__main__":
    command(main)

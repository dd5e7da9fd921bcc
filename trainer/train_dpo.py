"""Learning from preferences: of two answers to one prompt, the network learns to prefer the one that people prefer.

DPO (Rafailov et al. 2023, eq. 7) needs neither a reward model nor sampling. With a reference, the frozen network that
training starts from, its loss for a pair of a chosen answer w and a rejected answer l is

    -log sigmoid(beta * [(log p(w) - log p_ref(w)) - (log p(l) - log p_ref(l))])

and beta * (log p - log p_ref) is the reward that it finds in an answer. --loss_type takes others of the family, whose
equations are in preference_losses.py: robust (some pairs are the wrong way round), ipo (a margin that is not exceeded), kto
(also single answers that are good or bad), and, without a reference, simpo and orpo. The loss is the mean over the pairs
(kto: answers) of an optimizer step. The answers of a pair share their prompt, which is computed once: pair_dataset.py.

    python trainer/train_dpo.py --save_dir out/quickstart --max_seq_len 256 --batch_size 4 --epochs 2 \
        --learning_rate 1e-4 --sft_weight 1
    python trainer/train_dpo.py --data_path pairs.jsonl.xz --batch_size 16 --sft_weight 0.2
    python trainer/train_dpo.py --data_path thumbs.jsonl --loss_type kto --undesirable_weight 1.3 --save_weight kto

The first takes about a minute on a CPU, on the toy world, from the model of scripts/quickstart.py. What to expect: the loss
begins at ln 2 = 0.693, where nothing is preferred to the reference yet, and falls; the accuracy of the rewards on held-out
pairs rises from one half, and log_probs/accuracies, the share of pairs whose chosen answer is the likelier one, from where
the model was: in scripts/ladder.py from 95 to 99.7%, and sampled answers that are right and polite from 68 to 99%.
log_probs/chosen often falls too, only less than log_probs/rejected; where it falls far, other skills suffer,
and --sft_weight holds it. With too low a learning rate nothing happens at all, which the run says.
"""

import sys
from collections import deque
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch

from dataset.inspect_rows import show_rows
from dataset.pair_dataset import MismatchedPairs, PairBatches, PairDataset, collate_packed
from dataset.token_cache import fingerprint
from dataset.toy_world import write_world
from trainer.arguments import TrainArgs, arg, check_not_negative, check_positive, command, parse_args
from trainer.checkpoint import Checkpoint
from trainer.evaluation import sample, validation_sets
from trainer.loop import Loop
from trainer.optim import build_optimizer
from trainer.preference_losses import dpo_loss, ipo_loss, kto_loss, orpo_loss, robust_loss, simpo_loss
from trainer.reference import Reference, log_probs
from trainer.run import Run, evaluating
from trainer.steps import count_targets, step_batches
from trainer.weights import load_model, run_folder

TOY = ROOT / "dataset" / "toy_mini"
FLAGS = {  # what each loss takes beside --beta
    "sigmoid": {"reference", "sft_weight", "label_smoothing"}, "robust": {"reference", "sft_weight", "label_smoothing"},
    "ipo": {"reference", "sft_weight"}, "kto": {"reference", "desirable_weight", "undesirable_weight"},
    "simpo": {"sft_weight", "gamma"}, "orpo": set(),
}
STUCK = 0.02  # a mean reward margin below which nothing has been learned


@dataclass
class DPOArgs(TrainArgs):
    data_path: list[str] = arg([], "rows of pairs; FILE@0.4 takes that share of them (default: the toy world)", nargs="+")
    from_weight: str = arg("full_sft", "start from this run (a name in SAVE_DIR), checkpoint folder or .pth file")
    save_weight: str = arg("dpo", "name of this run: it is saved in SAVE_DIR/SAVE_WEIGHT_PRESET")
    max_seq_len: int = arg(1024, "tokens of a packed row: a pair, its prompt counted once, is cut to that")
    learning_rate: float = arg(2e-5, "peak learning rate")
    weight_decay: float = arg(0.0, "decay of the matrices (norms have none)")
    val_share: float = arg(0.05, "share of the prompts held out for validation; 0: none")
    loss_type: str = arg("sigmoid", "what is learned from a pair; sigmoid is DPO", choices=list(FLAGS))
    beta: float | None = arg(None, "the loss's beta: the larger, the closer to the reference (default: 0.1; simpo: 2)")
    label_smoothing: float = arg(0.0, "sigmoid, robust: the share of pairs that is thought to be the wrong way round")
    gamma: float = arg(1.0, "simpo: the margin to reach")
    desirable_weight: float = arg(1.0, "kto: weight of the answers that are wanted")
    undesirable_weight: float = arg(1.0, "kto: weight of the answers that are not wanted")
    sft_weight: float = arg(0.0, "weight of the chosen answer's -log p per token beside the loss (Pang et al. 2024, eq. 1)")
    reference: str = arg("cached", "the reference's log-probabilities: computed once and kept in --cache_dir, or in each step "
                                   "by a second network in memory", choices=["cached", "on_the_fly"])

    FREE = tuple(name for name in TrainArgs.FREE if name != "from_weight")  # which names the reference

    def check(self):
        """TrainArgs.check; the ranges of this stage's flags, and those that the loss does not use."""
        super().check()
        check_positive(self, "beta")
        check_not_negative(self, "gamma", "desirable_weight", "undesirable_weight", "sft_weight")
        if unused := sorted(self.given & set().union(*FLAGS.values()) - FLAGS[self.loss_type]):
            raise ValueError(f"--loss_type {self.loss_type} does not use {', '.join(f'--{name}' for name in unused)}: leave "
                             "that out, or choose another loss")
        if not 0 <= self.label_smoothing < 0.5 or (self.loss_type == "robust" and not self.label_smoothing):
            raise ValueError(f"--label_smoothing {self.label_smoothing}: give a share below 0.5, the half that nothing can be "
                             "learned from; --loss_type robust needs one above 0")
        if self.dropout:
            raise ValueError("--dropout would add its noise to the log-probabilities that are compared here: leave it out")
        if self.from_weight == "none" and self.has_reference:
            raise ValueError(f"--from_weight none with --loss_type {self.loss_type}, which compares with the network that "
                             "training starts from: give one that can answer, or choose simpo or orpo")
        self.beta = self.beta or (2.0 if self.loss_type == "simpo" else 0.1)

    @property
    def has_reference(self):
        return "reference" in FLAGS[self.loss_type]


def losses_and_rewards(args, policy, reference, lengths, kl=0.0):
    """(loss of each pair, kto: of its answers together, [N]; rewards [N, 2]) from log p, log p_ref and lengths, all [N, 2].

    Of a single answer the other side has length 0.
    """
    average = policy / lengths.clamp(min=1)
    ratio = policy - reference if args.has_reference else average
    if args.loss_type == "sigmoid":
        losses = dpo_loss(ratio[:, 0] - ratio[:, 1], args.beta, args.label_smoothing)
    elif args.loss_type == "robust":
        losses = robust_loss(ratio[:, 0] - ratio[:, 1], args.beta, args.label_smoothing)
    elif args.loss_type == "ipo":
        losses = ipo_loss(ratio[:, 0] / lengths[:, 0], ratio[:, 1] / lengths[:, 1], args.beta)
    elif args.loss_type == "simpo":
        losses = simpo_loss(average[:, 0], average[:, 1], args.beta, args.gamma)
    elif args.loss_type == "orpo":
        losses = orpo_loss(average[:, 0], average[:, 1], args.beta)
    else:
        is_desirable = torch.tensor([True, False], device=policy.device)
        losses = kto_loss(ratio, is_desirable, kl, args.beta, args.desirable_weight, args.undesirable_weight)
        losses = (losses * (lengths > 0)).sum(1)
    return losses - args.sft_weight * average[:, 0], args.beta * ratio.detach()


def count_losses(args, micro_batches):
    """What the loss is the mean over: pairs, with kto answers."""
    lengths = torch.cat([micro["lengths"] for micro in micro_batches])
    return int((lengths > 0).sum()) if args.loss_type == "kto" else len(lengths)


def sums_of(losses, rewards, policy, lengths):
    """What `figures_of` takes, of one batch: sums over pairs and answers, float64 [10]."""
    there = lengths > 0  # N 2
    pair = there.all(1)
    right = [torch.sign(x[:, 0] - x[:, 1]) / 2 + 0.5 for x in (rewards, policy)]  # 1, or 0, or 1/2 for none better
    return torch.cat([(rewards * there).sum(0), (policy * there).sum(0), there.sum(0), torch.stack(
        [(right[0] * pair).sum(), (right[1] * pair).sum(), pair.sum(), losses.sum()])]).detach().double()


def figures_of(args, sums):
    """(mean loss, {name: mean}) of the sums of all ranks; what there is none of is left out."""
    *totals, num_chosen, num_rejected, right, likelier, num_pairs, loss = sums.tolist()
    names = ("rewards/chosen", "rewards/rejected", "log_probs/chosen", "log_probs/rejected",
             "rewards/accuracies", "log_probs/accuracies")
    counts = (num_chosen, num_rejected, num_chosen, num_rejected, num_pairs, num_pairs)
    figures = {name: total / count for name, total, count in zip(names, [*totals, right, likelier], counts) if count}
    if num_chosen and num_rejected:
        figures["rewards/margins"] = figures["rewards/chosen"] - figures["rewards/rejected"]
    return loss / (num_chosen + num_rejected if args.loss_type == "kto" else num_pairs), figures


def estimate_kl(model, reference, mismatched, micro_batches, pad_id, run):
    """KTO's KL(p || p_ref): the mean log p / p_ref of the answers in `mismatched`, for the prompts of a step; 0 at least.

    Of the whole step, all ranks, and without gradient, so that it does not depend on how the step is cut.
    """
    total = count = 0.0
    with evaluating(model), run.autocast():
        for micro in micro_batches:
            items = micro["items"].tolist()
            batch = run.to_device(collate_packed(items, mismatched, mismatched.dataset.max_seq_len, pad_id))
            total += (log_probs(model, batch)[0] - reference(mismatched, batch)).sum()
            count += (batch["lengths"] > 0).sum()
    return max(0.0, run.sum(total) / max(run.sum(count), 1))


def score(model, tokenizer, view, reference, mismatched, run, args):
    """`figures_of` all pairs of a held-out view."""
    batches = PairBatches(view, batch_size=args.batch_size, accumulation_steps=1, max_seq_len=args.max_seq_len, seed=0,
                          epochs=1, pad_id=tokenizer.pad_token_id, rank=run.ranks.rank, world_size=run.ranks.world_size)
    kl, sums = 0.0, 0.0
    if mismatched:
        kl = estimate_kl(model, reference, mismatched, chain.from_iterable(batches), tokenizer.pad_token_id, run)
    with evaluating(model), run.autocast():
        for micro in chain.from_iterable(batches):
            batch = run.to_device(micro)
            policy = log_probs(model, batch)[0]
            losses, rewards = losses_and_rewards(args, policy, reference and reference(view, batch), batch["lengths"], kl)
            sums += sums_of(losses, rewards, policy, batch["lengths"])
    return figures_of(args, run.ranks.sum_tensor(sums))


def main(argv=None):
    args = parse_args(DPOArgs, argv)
    with Run(args) as run:
        if not args.data_path:
            run.ranks.from_first(lambda: write_world("mini", TOY))
            args.data_path = [str(TOY / "dpo_train.jsonl")]
            if not args.val_path and "val_share" not in args.given:
                args.val_path = [str(TOY / "dpo_heldout.jsonl")]
        model, tokenizer = load_model(args, run.device)
        folder, pad_id = run_folder(args, model.config, run.ranks), tokenizer.pad_token_id

        def build(paths):
            return PairDataset(paths, tokenizer, args.max_seq_len, bad_rows=args.bad_rows, cache_dir=args.cache_dir,
                               num_proc=args.num_proc, unpaired=args.loss_type == "kto")

        dataset = build(args.data_path)
        if args.inspect:
            return show_rows(dataset, tokenizer, args.inspect)
        run.say(dataset.report)
        training, held_out = validation_sets(args, dataset, build)
        views = [training, *held_out.values()]
        mismatched = {view.fingerprint: MismatchedPairs(view) for view in views} if args.loss_type == "kto" else {}
        reference = Reference(model, [*views, *mismatched.values()], pad_id, run, args) if args.has_reference else None
        data = fingerprint(data=training.fingerprint, reference=reference.name) if reference else training.fingerprint
        optimizer = build_optimizer(model, args)
        checkpoint = Checkpoint(folder, args, run, model, tokenizer, optimizer, data)
        batches = step_batches(PairBatches, training, args, run, tokenizer, checkpoint)
        run.say(f"{folder}: {model.num_parameters() / 1e6:.1f}M parameters, {len(batches)} steps on {run}, "
                f"{len(training) / len(batches.rows(0)):.1f} pairs in a row; {run.memory_advice(model)}")
        net = run.wrap(model, optimizer)

        def evaluate(index):
            scores, sentences = {}, []
            for name, view in held_out.items():
                loss, figures = score(model, tokenizer, view, reference, mismatched.get(view.fingerprint), run, args)
                scores |= {f"val_loss/{name}": loss, **{f"val_{what}/{name}": x for what, x in figures.items()}}
                prompt, text = sample(model, tokenizer, view, index, run)
                sentences.append(f"{name}: loss {loss:.4f}, " + ", ".join(f"{what} {x:.3f}" for what, x in figures.items())
                                 + f"; {prompt.strip()!r} -> {text.strip()!r}")
            return scores, "\n".join(sentences)

        margins = deque(maxlen=10)
        with Loop(folder, args, run, model, optimizer, checkpoint, batches, data, evaluate if held_out else None,
                  evaluate_first=True) as loop:
            for micro_batches in loop:
                num_losses, num_targets = run.sum(count_losses(args, micro_batches)), run.sum(count_targets(micro_batches))
                kl, sums = 0.0, 0.0
                if mismatched:
                    kl = estimate_kl(model, reference, mismatched[training.fingerprint], micro_batches, pad_id, run)
                for micro in micro_batches:
                    batch = run.to_device(micro)
                    with run.micro_step(is_last=micro is micro_batches[-1]):
                        policy, balance_loss = log_probs(net, batch, num_targets)
                        losses, rewards = losses_and_rewards(
                            args, policy, reference and reference(training, batch), batch["lengths"], kl)
                        run.backward(losses.sum() / num_losses + balance_loss)
                    sums += sums_of(losses, rewards, policy, batch["lengths"])
                loss, figures = figures_of(args, run.ranks.sum_tensor(sums))
                figures |= {"kl": kl} if mismatched else {}
                loop.update(loss, num_targets, micro_batches, **figures)  # clip, step, log, validate, save
                if loop.done > 1 and "rewards/margins" in figures:  # that of the first step was computed before any update
                    margins.append(figures["rewards/margins"])
                checked_at = min(len(batches), max(10, len(batches) // 3))
                if reference and margins and loop.done == checked_at and abs(sum(margins) / len(margins)) < STUCK:
                    loop.record.say(f"warning: after {loop.done} of {len(batches)} steps the rewards' margin is still about 0, "
                                    f"where it began: --learning_rate {args.learning_rate:g} is too low, try ten times as much")


if __name__ == "__main__":
    command(main)

"""A reward model: from pairs of answers, one number that says how good an answer is.

The network's head is replaced by a single number, read at the last token of a conversation: the reward r. If people prefer
one answer to another with the probability sigmoid(r_chosen - r_rejected) (Bradley & Terry 1952), the negative
log-likelihood of what they preferred is the loss (Ouyang et al. 2022, eq. 1),

    -log sigmoid(r_chosen - r_rejected),

the mean over the pairs of an optimizer step. It says nothing about where 0 is: --center_weight adds
(r_chosen + r_rejected)^2, which holds the rewards around it (Eisenstein et al. 2023, eq. 2). Pairs are those of
train_dpo.py, with the prompt computed once for both answers; those that are too long are left out, since a reward is one of
a whole answer.

    python trainer/train_reward.py --save_dir out/quickstart --max_seq_len 256 --batch_size 4 --epochs 3 \
        --learning_rate 5e-4 --warmup_share 0.1
    python trainer/train_reward.py --data_path pairs.jsonl.xz --batch_size 16 --center_weight 0.01
    python trainer/train_reward.py --data_path pairs.jsonl.xz --from_weight dpo --save_weight judge

The first takes about a minute on a CPU, on the toy world, from the model of scripts/quickstart.py. What to expect: the loss
begins near ln 2 = 0.693 and falls; the share of held-out pairs whose chosen answer gets the higher reward rises from one
half, to 91% with the 6,000 pairs of scripts/ladder.py. The folder is a standard sequence classifier, which
AutoModelForSequenceClassification loads; `score_conversations` in reward_scores.py asks it.
"""

import sys
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch

from dataset.inspect_rows import show_rows
from dataset.pair_dataset import PairBatches, PairDataset, tree_mask
from dataset.toy_world import write_world
from model.reward_model import MiniMindForSequenceClassification
from trainer.arguments import TrainArgs, arg, check_not_negative, command, parse_args
from trainer.checkpoint import Checkpoint
from trainer.evaluation import validation_sets
from trainer.loop import Loop
from trainer.optim import build_optimizer
from trainer.preference_losses import bradley_terry_loss
from trainer.run import Run, evaluating
from trainer.steps import step_batches
from trainer.weights import load_model, run_folder

TOY = ROOT / "dataset" / "toy_mini"


@dataclass
class RewardArgs(TrainArgs):
    data_path: list[str] = arg([], "rows of pairs; FILE@0.4 takes that share of them (default: the toy world)", nargs="+")
    from_weight: str = arg("full_sft", "start from this run (a name in SAVE_DIR), checkpoint folder or .pth file")
    save_weight: str = arg("reward", "name of this run: it is saved in SAVE_DIR/SAVE_WEIGHT_PRESET")
    max_seq_len: int = arg(1024, "tokens of a packed row: longer pairs, their prompt counted once, are left out")
    learning_rate: float = arg(1e-4, "peak learning rate")
    weight_decay: float = arg(0.0, "decay of the matrices (norms have none)")
    val_share: float = arg(0.05, "share of the prompts held out for validation; 0: none")
    center_weight: float = arg(0.0, "weight of (chosen + rejected reward)^2 beside the loss, such as 0.01")

    def check(self):
        """TrainArgs.check, the weight, and no dropout."""
        super().check()
        check_not_negative(self, "center_weight")
        if self.dropout:
            raise ValueError("--dropout would add noise of its own to each of the two rewards that are compared: leave it out")


def rewards_of(net, batch, num_rewards=1):
    """(rewards of all pairs, float32 [N, 2]; the balance loss's part of the step's loss) of a `collate_trees` batch.

    num_rewards: of the whole step. The second is 0 unless the network is a mixture of experts, to keep them busy alike.
    """
    out = net(batch["input_ids"], attention_mask=tree_mask(batch["tree"], batch["branch"]), position_ids=batch["position_ids"],
              logits_to_keep=batch["is_end"], num_items_in_batch=num_rewards)
    return out.logits.float().view(-1, 2), out.loss


def sums_of(losses, rewards):
    """Sums over the pairs of a batch, float64 [5], that `figures_of` makes means of."""
    right = torch.sign(rewards[:, 0] - rewards[:, 1]) / 2 + 0.5  # 1, or 0, or 1/2 where both are alike
    return torch.stack([*rewards.sum(0), right.sum(), losses.sum(), losses.new_tensor(len(losses))]).detach().double()


def figures_of(sums):
    """(mean loss, {name: mean}) of the sums of all ranks."""
    *means, loss = (sums[:-1] / sums[-1]).tolist()
    figures = dict(zip(("rewards/chosen", "rewards/rejected", "rewards/accuracies"), means))
    return loss, figures | {"rewards/margins": figures["rewards/chosen"] - figures["rewards/rejected"]}


def score(model, tokenizer, view, run, args):
    """`figures_of` all pairs of a held-out view."""
    batches = PairBatches(view, batch_size=args.batch_size, accumulation_steps=1, max_seq_len=args.max_seq_len, seed=0,
                          epochs=1, pad_id=tokenizer.pad_token_id, rank=run.ranks.rank, world_size=run.ranks.world_size)
    sums = 0.0
    with evaluating(model), run.autocast():
        for micro in chain.from_iterable(batches):
            rewards, _ = rewards_of(model, run.to_device(micro))
            sums += sums_of(bradley_terry_loss(*rewards.unbind(1), args.center_weight), rewards)
    return figures_of(run.ranks.sum_tensor(sums))


def main(argv=None):
    args = parse_args(RewardArgs, argv)
    with Run(args) as run:
        if not args.data_path:
            run.ranks.from_first(lambda: write_world("mini", TOY))
            args.data_path = [str(TOY / "dpo_train.jsonl")]
            if not args.val_path and "val_share" not in args.given:
                args.val_path = [str(TOY / "dpo_heldout.jsonl")]
        language_model, tokenizer = load_model(args, run.device)
        model = MiniMindForSequenceClassification.from_causal_lm(language_model)
        folder = run_folder(args, model.config, run.ranks)

        def build(paths):
            return PairDataset(paths, tokenizer, args.max_seq_len, bad_rows=args.bad_rows, cache_dir=args.cache_dir,
                               num_proc=args.num_proc, whole=True)

        dataset = build(args.data_path)
        if args.inspect:
            return show_rows(dataset, tokenizer, args.inspect)
        run.say(dataset.report)
        training, held_out = validation_sets(args, dataset, build)
        optimizer = build_optimizer(model, args)
        checkpoint = Checkpoint(folder, args, run, model, tokenizer, optimizer, training.fingerprint)
        batches = step_batches(PairBatches, training, args, run, tokenizer, checkpoint)
        run.say(f"{folder}: {model.num_parameters() / 1e6:.1f}M parameters, {len(batches)} steps on {run}, "
                f"{len(training) / len(batches.rows(0)):.1f} pairs in a row; {run.memory_advice(model)}")
        net = run.wrap(model, optimizer)

        def evaluate(index):
            scores, sentences = {}, []
            for name, view in held_out.items():
                loss, figures = score(model, tokenizer, view, run, args)
                scores |= {f"val_loss/{name}": loss, **{f"val_{what}/{name}": x for what, x in figures.items()}}
                sentences.append(f"{name}: loss {loss:.4f}, " + ", ".join(f"{what} {x:.3f}" for what, x in figures.items()))
            return scores, "\n".join(sentences)

        with Loop(folder, args, run, model, optimizer, checkpoint, batches, training.fingerprint,
                  evaluate if held_out else None, evaluate_first=True) as loop:
            for micro_batches in loop:
                num_pairs = run.sum(sum(len(micro["items"]) for micro in micro_batches))
                sums = 0.0
                for micro in micro_batches:
                    batch = run.to_device(micro)
                    with run.micro_step(is_last=micro is micro_batches[-1]):
                        rewards, balance_loss = rewards_of(net, batch, 2 * num_pairs)
                        losses = bradley_terry_loss(*rewards.unbind(1), args.center_weight)
                        run.backward(losses.sum() / num_pairs + balance_loss)
                    sums += sums_of(losses, rewards)
                    micro["labels"] = micro["input_ids"].masked_fill(~micro["is_end"], -100)  # all that was trained at
                loss, figures = figures_of(run.ranks.sum_tensor(sums))
                loop.update(loss, 2 * num_pairs, micro_batches, **figures)  # clip, step, log, validate, save


if __name__ == "__main__":
    command(main)

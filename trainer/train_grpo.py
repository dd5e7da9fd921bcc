"""GRPO and its family: several answers to each prompt, and what is better than its neighbours becomes likelier.

For a prompt the policy samples a group of G answers, each gets a reward R_i, and all tokens of answer i get the advantage

    A_i = (R_i - mean(R)) / std(R)

so no second network has to say what was to be expected (Shao et al. 2024, GRPO). With the ratio w = pi(t) / pi_old(t) of a
token's probability now to that with which it was sampled, the loss is PPO's clipped one, -min(w A, clip(w, 1 - low, 1 + high) A).
--loss_type chooses a member of the family:

    grpo     a mean over the tokens of an answer, then over the answers
    dr_grpo  no division by std(R), and by the longest length instead of the answer's own: long wrong answers and easy or hard
             prompts count no more than others (Liu et al. 2025)
    dapo     a mean over all tokens; a wider clip upwards; groups whose answers are all as good are replaced by others; with
             --rewards answer=1 overlong=1 answers near the longest length lose (Yu et al. 2025)
    cispo    the weight w is clipped, not the loss, so no token loses its gradient: -min(w, 1 + high) A log pi (MiniMax 2025)
    gspo     one ratio for the whole answer, the geometric mean of its tokens' (Zheng et al. 2025)

A group whose rewards are all the same says nothing: it is counted (degenerate_share) and left out of all means and deviations,
also of --kl_weight's; with --resample others are drawn in its place.

    python trainer/train_grpo.py --from_weight out/quickstart/full_sft_tiny --max_steps 20      # a minute on a CPU
    python trainer/train_grpo.py --from_weight out/quickstart/full_sft_tiny --loss_type dapo --rewards answer=1 overlong=1 \\
        --overlong_buffer 32 --save_weight dapo
    python trainer/train_grpo.py --from_weight reason --enable_thinking on --data_path maths.jsonl --max_new_tokens 1024 \\
        --max_seq_len 2048 --rewards answer=1 format=0.2 --lora_rank 32

What to expect: reward/answer, of what is sampled, rises, and val_reward/answer, of the likeliest answers to held-out prompts,
with it, where some answers to a prompt are right and others not: from a model that mostly leaves out the steps, 120 steps of
the default size took the toy world's held-out questions from 53 to 75% in 200 seconds (docs/LOG.md; scripts/ladder.py --rungs
grpo). Where all answers are wrong, degenerate_share is near 1, and nothing is learned. transcripts.jsonl shows answers.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch

from trainer.advantages import group_advantages, has_spread
from trainer.arguments import arg, check_not_negative, check_positive, command, parse_args
from trainer.checkpoint import Checkpoint
from trainer.experience import columns_of, updates_of
from trainer.loop import Loop
from trainer.optim import build_optimizer
from trainer.policy import (
    PolicyArgs,
    Transcripts,
    held_out_scores,
    load_policy,
    open_rollout,
    policy_outputs,
    prompt_sets,
    prompt_steps,
    reference_log_probs,
    reward_table,
    sample_figures,
    sample_groups,
    token_sums,
)
from trainer.policy_losses import cispo_loss, clipped_loss, kl_estimate, sequence_log_ratio, token_weights
from trainer.rewards import Rewards
from trainer.rollout import draw_seed
from trainer.run import Run
from trainer.weights import run_folder

FAMILY = {  # what --loss_type stands for, where a flag does not say otherwise
    "grpo": dict(clip_low=0.2, clip_high=0.2, scale="group", weighting="sequence", resample=0),
    "dr_grpo": dict(clip_low=0.2, clip_high=0.2, scale="none", weighting="constant", resample=0),
    "dapo": dict(clip_low=0.2, clip_high=0.28, scale="group", weighting="token", resample=2),
    "cispo": dict(clip_low=1.0, clip_high=4.0, scale="group", weighting="token", resample=0),
    "gspo": dict(clip_low=3e-4, clip_high=4e-4, scale="group", weighting="sequence", resample=0),
}


@dataclass
class GRPOArgs(PolicyArgs):
    save_weight: str = arg("grpo", "name of this run: it is saved in SAVE_DIR/SAVE_WEIGHT_PRESET")
    loss_type: str = arg("grpo", "which of the family; it decides the flags below that are not given", choices=list(FAMILY))
    clip_low: float | None = arg(None, "a ratio below 1 - this stops the gradient (default: by --loss_type)")
    clip_high: float | None = arg(None, "a ratio above 1 + this stops the gradient; cispo: is clipped there")
    scale: str | None = arg(None, "what advantages are divided by: std of the group's rewards, of the batch's, or nothing",
                            choices=["group", "batch", "none"])
    weighting: str | None = arg(None, "a token counts as 1 / all tokens, 1 / its answer's, or 1 / the longest length",
                                choices=["token", "sequence", "constant"])
    resample: int | None = arg(None, "how often other prompts are drawn in place of groups whose rewards are all the same")

    def check(self):
        """PolicyArgs.check; fills in what --loss_type decides, and checks the ranges."""
        super().check()
        if self.num_generations < 2:
            raise ValueError(f"--num_generations {self.num_generations}: an answer is compared with its group's others; give 2 "
                             "or more, or take train_spo.py, which needs no group")
        if self.loss_type == "cispo" and "clip_low" in self.given:
            raise ValueError("--clip_low has no effect with --loss_type cispo, which clips upwards alone: leave it out")
        for name, value in FAMILY[self.loss_type].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        check_positive(self, "clip_low", "clip_high")
        check_not_negative(self, "resample")


def collect(rollout, dataset, items, rewards, run, args, step):
    """(groups that say something, all that were sampled, as lists of Samples group after group; share without spread).

    Groups of equal rewards are left out; --resample times others are drawn in their place.
    """
    G, found, everything = args.num_generations, [], []
    rollout.refresh()
    for attempt in range(args.resample + 1):
        samples = sample_groups(rollout, dataset, items, rewards, run, args, step, attempt)
        everything += samples
        spread = has_spread(reward_table(samples, G)).tolist()
        found += [sample for i, sample in enumerate(samples) if spread[i // G]]
        missing = args.num_prompts - len(found) // G
        if not missing:
            break
        items = [draw_seed(args.seed, step, attempt, place, "other") % len(dataset) for place in range(missing)]
    return found, everything, 1 - len(found) / len(everything)


def losses_of(args, log_probs, batch):
    """(loss of each sampled token [n], which of them the clip has cut, bool [n])."""
    if args.loss_type == "cispo":
        return cispo_loss(log_probs, batch["old_log_probs"], batch["advantages"], args.clip_high)
    log_ratio = log_probs - batch["old_log_probs"]
    if args.loss_type == "gspo":
        log_ratio = sequence_log_ratio(log_probs, batch["old_log_probs"], batch["sequence"])
    return clipped_loss(log_ratio, batch["advantages"], args.clip_low, args.clip_high)


def update(net, reference, micro_batches, num_tokens, num_sequences, run, args):
    """Add up the gradients of one update: its sums [5] over tokens of all ranks, for the log."""
    sums = torch.zeros(5, dtype=torch.float64, device=run.device)
    for micro in micro_batches:
        batch = run.to_device(micro)
        with run.micro_step(is_last=micro is micro_batches[-1]):
            log_probs, entropies, balance_loss = policy_outputs(net, batch, num_tokens, args.temperature)
            losses, is_clipped = losses_of(args, log_probs, batch)
            kl = torch.zeros_like(losses)
            if reference:
                kl = kl_estimate(log_probs, reference_log_probs(reference, batch, args.temperature), args.kl_kind)
            weights = token_weights(batch["sequence"], args.weighting, num_sequences, num_tokens, args.max_new_tokens)
            loss = (weights * (losses + args.kl_weight * kl)).sum() + balance_loss
            run.backward(loss)
        moved = kl_estimate(batch["old_log_probs"], log_probs.detach(), "k3")  # the tokens are the old policy's
        sums += token_sums(num_tokens, loss, kl, moved, entropies, is_clipped)
    return run.ranks.sum_tensor(sums)


def main(argv=None):
    args = parse_args(GRPOArgs, argv)
    with Run(args) as run:
        model, saved, tokenizer, reference = load_policy(args, run)
        folder, pad_id = run_folder(args, model.config, run.ranks), tokenizer.pad_token_id
        training, held_out, data = prompt_sets(args, run, model, tokenizer)
        rewards = Rewards(args, tokenizer, run)
        optimizer = build_optimizer(model, args)
        checkpoint = Checkpoint(folder, args, run, saved, tokenizer, optimizer, data)
        steps = prompt_steps(training, args)
        run.say(f"{folder}: {model.num_parameters() / 1e6:.1f}M parameters, {len(steps)} steps of {args.num_prompts} prompts x "
                f"{args.num_generations} answers on {run}; {run.memory_advice(model)}")
        net, rollout = run.wrap(model, optimizer), open_rollout(saved, model, tokenizer, run, args)

        def evaluate(index):
            return held_out_scores(rollout, held_out, rewards, run, args)

        with Loop(folder, args, run, model, optimizer, checkpoint, steps, data, evaluate if held_out else None,
                  evaluate_first=True) as loop:
            transcripts = Transcripts(folder, args, run, loop.done)
            for items in loop:
                samples, everything, degenerate_share = collect(rollout, training, items, rewards, run, args, loop.done)
                advantages = group_advantages(reward_table(samples, args.num_generations), args.scale).flatten().tolist()
                columns = columns_of(samples, advantages)
                updates, trained, num_trained = [], [], 0
                for micro_batches, num_tokens, num_sequences in updates_of(samples, columns, run, args, pad_id, loop.done):
                    updates.append(update(net, reference, micro_batches, num_tokens, num_sequences, run, args))
                    trained, num_trained = trained + micro_batches, num_trained + num_tokens
                    if not loop.apply(updates[-1][0].item(), micro_batches):
                        break  # the run has gone back to its last checkpoint
                else:
                    loss, kl, moved, entropy, clipped = torch.stack(updates).mean(0).tolist() if updates else [0.0] * 5
                    figures = {"kl/reference": kl} if reference else {}
                    figures |= {"kl/update": moved, "entropy": entropy, "clip_share": clipped,
                                "degenerate_share": degenerate_share}
                    transcripts.write(loop.done + 1, everything)
                    loop.advance(loss, num_trained, trained, **sample_figures(everything, rollout), **figures)


if __name__ == "__main__":
    command(main)

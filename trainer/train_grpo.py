"""GRPO and its family: several completions of each prompt, and the better ones become likelier.

For a prompt the policy samples a group of G completions, each gets a reward R_i, and all tokens of
completion i get the advantage

    A_i = (R_i - mean(R)) / std(R)

so no second network has to predict the reward (Shao et al. 2024, GRPO). With the ratio w = pi(t) /
pi_old(t) of a token's probability now to that with which it was sampled, the loss is PPO's clipped
one, -min(w A, clip(w, 1 - epsilon, 1 + epsilon_high) A). --loss_type chooses one of the family:

    grpo     a mean over the tokens of a completion, then over the completions
    dr_grpo  no division by std(R), and by the longest length instead of the completion's own: long
             wrong completions and easy or hard prompts count no more than others (Liu et al. 2025)
    dapo     a mean over all tokens; a wider clip upwards; other prompts replace groups of equal
             rewards; the reward overlong is made for it (Yu et al. 2025)
    cispo    -min(w, 1 + epsilon_high) A log pi: the clipped weight w has no gradient, so no token
             loses its own (MiniMax 2025)
    gspo     one ratio for a completion, the geometric mean of its tokens' (Zheng et al. 2025)

A group of equal rewards teaches nothing: it is counted (frac_reward_zero_std) and left out of all
means and deviations, also of the KL divergence's; --resample draws others in its place.

    python trainer/train_grpo.py --from_weight out/quickstart/full_sft_tiny --max_steps 20  # 1 min
    python trainer/train_grpo.py --from_weight out/quickstart/full_sft_tiny --loss_type dapo \\
        --rewards answer=1 overlong=1 --overlong_buffer 32 --save_weight dapo
    python trainer/train_grpo.py --from_weight reason --enable_thinking on --data_path my.jsonl

What to expect: where some completions of a prompt are right and others not, reward/answer (of the
sampled ones) rises, and val_reward/answer (of greedy ones to held-out prompts) with it. From a
model that mostly leaves out the steps, 120 steps of the default size took the toy world's held-out
questions from 53 to 75% in 200 seconds on a CPU (docs/LOG.md; scripts/evaluate_stages.py --stages
grpo). Where all completions are wrong, nothing is learned. transcripts.jsonl shows samples.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trainer.rl.arguments import PolicyArgs
from trainer.runtime.arguments import (
    arg,
    check_flags,
    check_not_negative,
    check_positive,
    command,
    parse_args,
)

# the columns of FAMILY
FIELDS = ("epsilon", "epsilon_high", "scale_rewards", "loss_normalization", "resample")
FAMILY = {  # the FIELDS of each --loss_type, where a flag does not say otherwise
    "grpo": (0.2, 0.2, "group", "sequence", 0),
    "dr_grpo": (0.2, 0.2, "none", "constant", 0),
    "dapo": (0.2, 0.28, "group", "token", 2),
    "cispo": (1.0, 4.0, "group", "token", 0),
    "gspo": (3e-4, 4e-4, "group", "sequence", 0),
}


@dataclass
class GRPOArgs(PolicyArgs):
    save_weight: str = "grpo"
    loss_type: str = arg(
        "grpo", "member of the family; it decides the flags below that are not given", list(FAMILY)
    )
    epsilon: float | None = arg(None, "lower bound of the clip: 1 - this", aliases=("clip_low",))
    epsilon_high: float | None = arg(
        None, "upper bound of the clip: 1 + this", aliases=("clip_high",)
    )
    scale_rewards: str | None = arg(
        None,
        "advantages are divided by: std of the group's rewards, of the batch's, or nothing",
        choices=["group", "batch", "none"],
        aliases=("scale",),
    )
    loss_normalization: str | None = arg(
        None,
        "weight of a token: 1 / all tokens, 1 / its completion's, or 1 / the longest length",
        choices=["token", "sequence", "constant"],
        aliases=("weighting",),
    )
    resample: int | None = arg(
        None, "DAPO's dynamic sampling: rounds of new prompts for groups of equal rewards, at most"
    )

    def check(self) -> None:
        """PolicyArgs.check; fills in the FIELDS of --loss_type, and checks the ranges."""
        super().check()
        if self.num_generations < 2:
            raise ValueError(
                f"--num_generations {self.num_generations}: a completion is compared with its "
                "group's others; give 2 or more, or take train_spo.py, which needs no group"
            )
        if self.loss_type == "cispo" and "epsilon" in self.given:
            raise ValueError(
                "--epsilon has no effect with --loss_type cispo, which clips upwards alone: leave "
                "it out"
            )
        for name, value in zip(FIELDS, FAMILY[self.loss_type]):
            if getattr(self, name) is None:
                setattr(self, name, value)
        check_positive(self, "epsilon", "epsilon_high")
        check_not_negative(self, "resample")


check_flags(GRPOArgs, __name__)  # --help need not wait for torch, which is imported below

import torch

from dataset.prompt_dataset import PromptDataset
from dataset.toy.tools import TOY_TOOLS
from trainer.losses.advantages import group_advantages, has_spread
from trainer.losses.policy import (
    cispo_loss,
    clipped_loss,
    kl_estimate,
    sequence_log_ratio,
    token_weights,
)
from trainer.rl.experience import minibatches, policy_outputs, reference_log_probs, token_experience
from trainer.rl.rewards import Rewards
from trainer.rl.rollout import (
    Sample,
    SingleTurn,
    draw_seed,
    rollout_metrics,
    sample_groups,
    total_rewards,
)
from trainer.rl.setup import load_policy, open_prompts, open_rollout, prompt_steps
from trainer.rl.transcripts import Transcripts
from trainer.rl.validation import held_out_scores
from trainer.runtime.checkpoint import TrainState
from trainer.runtime.loop import Loop
from trainer.runtime.means import average
from trainer.runtime.optimizers import build_optimizer, learning_rate_at, set_learning_rate
from trainer.runtime.run import Run


def collect(
    run: Run,
    sampler: SingleTurn,
    dataset: PromptDataset,
    items: list[int],
    rewards: Rewards,
    step: int,
) -> tuple[list[Sample], list[Sample]]:
    """(all samples, those of groups whose rewards differ), of all ranks, group after group.

    Up to --resample times, other prompts replace the groups whose rewards are all equal.
    """
    args, G, rollouts, kept = run.args, run.args.num_generations, [], []
    for attempt in range(args.resample + 1):
        samples = rewards.rate(sample_groups(run, sampler, dataset, items, step, attempt))
        samples = run.ranks.gather(samples)
        is_kept = has_spread(total_rewards(samples).view(-1, G)).tolist()
        kept += [sample for i, sample in enumerate(samples) if is_kept[i // G]]
        rollouts += samples
        places = range(args.num_prompts - len(kept) // G)
        if not places:
            break
        seeds = [draw_seed(args.seed, step, attempt, place, "other") for place in places]
        items = [seed % len(dataset) for seed in seeds]
    return rollouts, kept


def policy_loss(
    args: GRPOArgs, log_probs: torch.Tensor, batch: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss of each sampled token [n], whether its ratio was clipped, bool [n])."""
    old, advantages = batch["old_log_probs"], batch["advantages"]
    if args.loss_type == "cispo":
        return cispo_loss(log_probs, old, advantages, args.epsilon_high)
    log_ratio = log_probs - old
    if args.loss_type == "gspo":
        log_ratio = sequence_log_ratio(log_probs, old, batch["sequence"])
    return clipped_loss(log_ratio, advantages, args.epsilon, args.epsilon_high)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(GRPOArgs, argv)
    with Run(args) as run:
        model, saved, tokenizer, reference = load_policy(run)
        prompts, held_out, fingerprint = open_prompts(run, model, tokenizer)
        rewards = Rewards(run, tokenizer, TOY_TOOLS)
        sampler = SingleTurn(run, open_rollout(run, model, saved, tokenizer))
        optimizer = build_optimizer(model, args)
        state = TrainState(model, tokenizer, optimizer, fingerprint, saved)
        evaluate = partial(held_out_scores, run, sampler, held_out, rewards)
        loop = Loop(run, state, prompt_steps(run, prompts), evaluate, evaluate_first=True)
        transcripts = Transcripts(run, loop.done)

        for step, items in loop:
            learning_rate = learning_rate_at(step, loop.num_steps, args)
            set_learning_rate(optimizer, loop.learning_rate_factor * learning_rate)
            sampler.rollout.refresh()  # the policy as it is now
            rollouts, samples = collect(run, sampler, prompts, items, rewards, step)
            groups = total_rewards(samples).view(-1, args.num_generations)
            advantages = group_advantages(groups, args.scale_rewards).flatten()
            experience = token_experience(samples, advantages)
            updates, trained, num_trained = [], [], 0
            for micro_batches, num_tokens, num_sequences in minibatches(
                run, samples, experience, tokenizer.pad_token_id, step
            ):
                for micro in micro_batches:
                    batch = run.to_device(micro)
                    with run.micro_step(is_last=micro is micro_batches[-1]):
                        log_probs, entropy, balance_loss = policy_outputs(
                            loop.net, batch, num_tokens, args.temperature
                        )
                        losses, is_clipped = policy_loss(args, log_probs, batch)
                        if reference:
                            ref_log_probs = reference_log_probs(reference, batch, args.temperature)
                            kl = kl_estimate(log_probs, ref_log_probs, args.kl_estimator)
                            losses = losses + args.beta * kl
                            loop.means.add(len(kl), kl=kl)
                        weights = token_weights(
                            batch["sequence"],
                            args.loss_normalization,
                            num_sequences,
                            num_tokens,
                            args.max_completion_length,
                        )
                        loss = (weights * losses).sum() + balance_loss
                        run.backward(loss)
                    approx_kl = kl_estimate(batch["old_log_probs"], log_probs.detach(), "k3")
                    loop.means.add(loss=loss)
                    loop.means.add(
                        len(losses), approx_kl=approx_kl, entropy=entropy, clip_fraction=is_clipped
                    )
                updates.append(loop.means.reduce(run.ranks))
                update = run.clip_and_step(model, optimizer, updates[-1]["loss"])
                trained, num_trained = trained + micro_batches, num_trained + num_tokens
                if not loop.check(update, micro_batches):
                    break  # the run has gone back to its last checkpoint
            else:  # no update has sent the run back
                transcripts.write(step + 1, rollouts)
                metrics = rollout_metrics(rollouts, sampler.rollout)
                metrics["frac_reward_zero_std"] = 1 - len(samples) / len(rollouts)
                loop.advance(trained, num_trained, **({"loss": 0.0} | average(updates) | metrics))


if __name__ == "__main__":
    command(main)

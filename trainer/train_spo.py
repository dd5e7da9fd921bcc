"""SPO: one completion of each prompt, compared with the reward that this prompt is known to earn.

GRPO samples every prompt several times to learn what to expect, and groups that are all right or
all wrong were sampled in vain. Here expectations are remembered (Xu and Ding 2025, "Single-stream
policy optimization"): each prompt has a value v, a running mean of its rewards that forgets the
faster, the further the policy has moved since that prompt's last completion (rl/value_tracker.py).
The advantage of a completion with the reward r is

    A = r - v,   then whitened over the batch

and all of its tokens get it, in PPO's clipped loss. Prompts are drawn in proportion to sqrt(v (1 -
v)) + 0.05: those that are sometimes solved teach most. Before the first step --initial_completions
of every prompt say where the values begin.

    python trainer/train_spo.py --from_weight out/quickstart/full_sft_tiny --max_steps 10  # 1 min
    python trainer/train_spo.py --from_weight out/quickstart/full_sft_tiny \\
        --initial_completions 2 --num_prompts 64
    python trainer/train_spo.py --from_weight reason --enable_thinking on --data_path my.jsonl \\
        --max_completion_length 1024 --max_seq_len 2048 --num_prompts 256

What to look at: reward/answer is of the prompts that were drawn, and solved ones are drawn less
and less; value/mean is the expected reward of all prompts, val_reward/answer that of held-out ones:
from a model that mostly leaves out the steps, 60 steps took the toy world's from 53 to 74% in five
minutes on a CPU (docs/LOG.md; scripts/evaluate_stages.py --stages spo). Rewards must lie between 0
and 1.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trainer.rl.arguments import PolicyArgs, check_success_rewards
from trainer.runtime.arguments import (
    arg,
    check_flags,
    check_not_negative,
    check_positive,
    command,
    parse_args,
)

AT_ONCE = 1024  # prompts of the first completions


@dataclass
class SPOArgs(PolicyArgs):
    save_weight: str = "spo"
    num_prompts: int = 128
    num_generations: int = arg(1, "one completion of each prompt: no group is needed")
    initial_completions: int = arg(
        8,
        "completions of every prompt before the first step, from which its value begins; 0: at 1/2",
        aliases=("initial_answers",),
    )
    epsilon: float = arg(0.2, "lower bound of the clip: 1 - this", aliases=("clip_low",))
    epsilon_high: float = arg(0.28, "upper bound of the clip: 1 + this", aliases=("clip_high",))

    def check(self) -> None:
        """PolicyArgs.check, and the ranges of this stage's flags."""
        super().check()
        check_not_negative(self, "initial_completions")
        check_positive(self, "epsilon", "epsilon_high")
        check_success_rewards(self)
        if self.num_generations != 1:
            raise ValueError(
                "--num_generations: this stage takes one completion of each prompt; leave it out, "
                "or take train_grpo.py"
            )


check_flags(SPOArgs, __name__)  # --help need not wait for torch, which is imported below

from dataset.prompt_dataset import PromptDataset
from dataset.toy.tools import TOY_TOOLS
from trainer.losses.advantages import whiten
from trainer.losses.policy import clipped_loss, kl_estimate
from trainer.rl.experience import (
    minibatches,
    policy_outputs,
    reference_log_probs,
    sample_log_probs,
    token_experience,
)
from trainer.rl.rewards import Rewards
from trainer.rl.rollout import (
    Sampler,
    SingleTurn,
    draw_seed,
    part_of_rank,
    rollout_metrics,
    sample_groups,
    total_rewards,
)
from trainer.rl.setup import load_policy, open_prompts, open_rollout, prompt_steps
from trainer.rl.transcripts import Transcripts
from trainer.rl.validation import held_out_scores
from trainer.rl.value_tracker import SingleStream
from trainer.runtime.checkpoint import TrainState
from trainer.runtime.loop import Loop
from trainer.runtime.means import average
from trainer.runtime.optimizers import build_optimizer, learning_rate_at, set_learning_rate
from trainer.runtime.run import Run


def begin_values(
    run: Run, stream: SingleStream, sampler: Sampler, dataset: PromptDataset, rewards: Rewards
) -> None:
    """Begin the values with --initial_completions of every prompt; the ranks divide the work."""
    seed, n = run.args.seed, run.args.initial_completions
    sampler.rollout.refresh()
    for start in range(0, len(dataset), AT_ONCE):
        items = list(range(start, min(start + AT_ONCE, len(dataset))))
        drawn = [item for item in part_of_rank(items, run.ranks) for _ in range(n)]
        seeds = [draw_seed(seed, "first", item, i % n) for i, item in enumerate(drawn)]
        samples = rewards.rate(sampler(dataset, drawn, seeds))
        stream.last.remember(run.ranks.gather(samples[n - 1 :: n]))
        totals = run.ranks.gather(total_rewards(samples).tolist())
        stream.begin(items, totals)
        run.print0(
            f"first completions: {n} of each of {items[-1] + 1:,} of {len(dataset):,} prompts, "
            f"mean reward {sum(totals) / len(totals):.3f}"
        )


def main(argv: list[str] | None = None) -> None:
    args = parse_args(SPOArgs, argv)
    with Run(args) as run:
        model, saved, tokenizer, reference = load_policy(run)
        prompts, held_out, fingerprint = open_prompts(run, model, tokenizer)
        rewards = Rewards(run, tokenizer, TOY_TOOLS)
        sampler = SingleTurn(run, open_rollout(run, model, saved, tokenizer))
        stream, pad_id = SingleStream(prompts.prompts, args.num_prompts), tokenizer.pad_token_id
        optimizer = build_optimizer(model, args)
        state = TrainState(model, tokenizer, optimizer, fingerprint, saved, extra=stream)
        evaluate = partial(held_out_scores, run, sampler, held_out, rewards)
        loop = Loop(run, state, prompt_steps(run, prompts), evaluate, evaluate_first=True)
        transcripts = Transcripts(run, loop.done)
        if loop.done == 0 and args.initial_completions:
            begin_values(run, stream, sampler, prompts, rewards)

        for step, _ in loop:  # the values decide which prompts a step has
            learning_rate = learning_rate_at(step, loop.num_steps, args)
            set_learning_rate(optimizer, loop.learning_rate_factor * learning_rate)
            items = stream.tracker.draw(args.num_prompts, draw_seed(args.seed, step))
            sampler.rollout.refresh()  # the policy as it is now
            samples = rewards.rate(sample_groups(run, sampler, prompts, items, step, 0))
            samples = run.ranks.gather(samples)
            advantages = whiten(total_rewards(samples) - stream.values(samples))
            # afterwards the rewards count; the policy has moved since the last ones
            stream.update(samples, partial(sample_log_probs, run, model, pad_id))
            experience = token_experience(samples, advantages)
            updates, trained, num_trained = [], [], 0
            for micro_batches, num_tokens, _ in minibatches(run, samples, experience, pad_id, step):
                for micro in micro_batches:
                    batch = run.to_device(micro)
                    with run.micro_step(is_last=micro is micro_batches[-1]):
                        log_probs, entropy, balance_loss = policy_outputs(
                            loop.net, batch, num_tokens, args.temperature
                        )
                        log_ratio = log_probs - batch["old_log_probs"]
                        losses, is_clipped = clipped_loss(
                            log_ratio, batch["advantages"], args.epsilon, args.epsilon_high
                        )
                        if reference:
                            ref_log_probs = reference_log_probs(reference, batch, args.temperature)
                            kl = kl_estimate(log_probs, ref_log_probs, args.kl_estimator)
                            losses = losses + args.beta * kl
                            loop.means.add(len(kl), kl=kl)
                        loss = losses.sum() / num_tokens + balance_loss
                        run.backward(loss)
                    # the tokens were drawn from the old policy
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
            else:
                transcripts.write(step + 1, samples)
                metrics = rollout_metrics(samples, sampler.rollout) | average(updates)
                metrics["value/mean"] = stream.tracker.values().mean().item()
                loop.advance(trained, num_trained, **metrics)


if __name__ == "__main__":
    command(main)

"""Reinforcement learning of an agent: it calls tools, sees their results, calls again, answers, and
is rewarded at the end.

An episode begins with a question and a list of tools. Each turn of the policy is read; calls in it
are run, their results become the next messages, and the policy continues, at most --max_turns times
(trainer/rl/episodes.py). All tokens that the policy wrote are trained on, with the episode's one
advantage; tool results are context, no action of the policy, and have no loss. The advantage is
that of train_grpo.py, within a group of episodes (grpo, cispo), or that of train_spo.py with one
episode of each question (spo). All of an update's tokens count the same.

    python trainer/train_agent.py --from_weight out/quickstart/full_sft_tiny --max_steps 4  # 1 min
    python trainer/train_agent.py --from_weight out/quickstart/full_sft_tiny --loss_type spo \\
        --num_prompts 128
    python trainer/train_agent.py --from_weight full_sft --tools my_tools.py \\
        --data_path questions.jsonl --tool_timeout 5

Tools are Python functions (dataset/chat/tools.py says how to write them), run with a time limit;
the default are the toy world's, and those of dataset/chat/everyday_tools.py if rows offer them.
Rows are {"conversations": [system message with "tools", question], "gt": [values of the answer],
"calls": [calls that are needed]}. What to look at: reward/tools, the fraction of the needed calls
that were made, next to reward/answer; turns/mean. From a model that guesses where it should call,
20 steps took held-out questions of one call from 41 to 96% and those of two from 11 to 85% in five
minutes on a CPU (docs/LOG.md; scripts/evaluate_stages.py --stages agent).
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trainer.rl.arguments import PolicyArgs, check_success_rewards
from trainer.runtime.arguments import arg, check_flags, check_positive, command, parse_args

CLIP = {"grpo": (0.2, 0.2), "cispo": (1.0, 4.0), "spo": (0.2, 0.28)}  # epsilon, epsilon_high


@dataclass
class AgentArgs(PolicyArgs):
    save_weight: str = "agent"
    max_seq_len: int = arg(1024, "longest episode, in tokens; also the length of a batch row")
    num_generations: int | None = arg(None, "episodes of each prompt (default: 8; spo: 1)")
    rewards: list[str] = arg(
        ["answer=0.7", "tools=0.3"],
        "reward of an episode: a weighted sum of NAME=WEIGHT; see trainer/rl/rewards.py",
    )
    loss_type: str = arg(
        "grpo",
        "advantages in a group, with the clipped loss or CISPO's; or against a remembered value",
        choices=list(CLIP),
    )
    epsilon: float | None = arg(
        None, "lower bound of the clip: 1 - this (default: by --loss_type)", aliases=("clip_low",)
    )
    epsilon_high: float | None = arg(
        None, "upper bound of the clip: 1 + this (default: by --loss_type)", aliases=("clip_high",)
    )
    tools: str = arg(
        "", "a Python file with tools of your own (default: those of the toy world, everyday tools)"
    )
    tool_timeout: float = arg(5.0, "seconds that a tool may take", aliases=("tool_seconds",))
    max_turns: int = arg(4, "turns of an episode, at most: calls in the last one are not run")

    def check(self) -> None:
        """PolicyArgs.check, and the ranges of this stage's flags."""
        is_single = self.loss_type == "spo"
        if self.num_generations is None:
            self.num_generations = 1 if is_single else 8
        super().check()
        default = CLIP[self.loss_type]
        self.epsilon = default[0] if self.epsilon is None else self.epsilon
        self.epsilon_high = default[1] if self.epsilon_high is None else self.epsilon_high
        check_positive(self, "tool_timeout", "max_turns", "epsilon", "epsilon_high")
        if self.loss_type == "cispo" and "epsilon" in self.given:
            raise ValueError(
                "--epsilon has no effect with --loss_type cispo, which clips upwards alone: leave "
                "it out"
            )
        if is_single:
            check_success_rewards(self)
        if (self.num_generations == 1) != is_single:
            raise ValueError(
                f"--num_generations {self.num_generations} with --loss_type {self.loss_type}: spo "
                "has one episode of each prompt, the others compare several"
            )


check_flags(AgentArgs, __name__)  # --help need not wait for torch, which is imported below

import torch

from dataset.toy.tools import TOY_TOOLS
from trainer.losses.advantages import group_advantages, has_spread, whiten
from trainer.losses.policy import cispo_loss, clipped_loss, kl_estimate
from trainer.rl.episodes import Episodes, episode_metrics
from trainer.rl.experience import (
    minibatches,
    policy_outputs,
    reference_log_probs,
    sample_log_probs,
    token_experience,
)
from trainer.rl.rewards import Rewards
from trainer.rl.rollout import Sample, draw_seed, rollout_metrics, sample_groups, total_rewards
from trainer.rl.setup import load_policy, open_prompts, open_rollout, open_tools, prompt_steps
from trainer.rl.transcripts import Transcripts
from trainer.rl.validation import held_out_scores
from trainer.rl.value_tracker import Score, SingleStream
from trainer.runtime.checkpoint import TrainState
from trainer.runtime.loop import Loop
from trainer.runtime.means import average
from trainer.runtime.optimizers import build_optimizer, learning_rate_at, set_learning_rate
from trainer.runtime.run import Run


def group_baseline(episodes: list[Sample], size: int) -> tuple[list[Sample], torch.Tensor, dict]:
    """(the episodes of groups whose rewards differ, their advantages [n], metrics): GRPO's."""
    groups = total_rewards(episodes).view(-1, size)
    is_kept = has_spread(groups)
    kept = [one for i, one in enumerate(episodes) if is_kept[i // size]]
    metrics = {"frac_reward_zero_std": 1 - len(kept) / len(episodes)}
    return kept, group_advantages(groups[is_kept]).flatten(), metrics


def remembered_baseline(
    episodes: list[Sample], stream: SingleStream, score: Score
) -> tuple[list[Sample], torch.Tensor, dict]:
    """(the episodes, their advantages [n] against their prompts' values, metrics): SPO's."""
    advantages = whiten(total_rewards(episodes) - stream.values(episodes))
    stream.update(episodes, score)
    return episodes, advantages, {"value/mean": stream.tracker.values().mean().item()}


def main(argv: list[str] | None = None) -> None:
    args = parse_args(AgentArgs, argv)
    with Run(args) as run:
        model, saved, tokenizer, reference = load_policy(run)
        prompts, held_out, fingerprint = open_prompts(run, model, tokenizer, "agent")
        tools = open_tools(run, [prompts, *held_out.values()], TOY_TOOLS)
        pure_tools = TOY_TOOLS if args.tools else tools  # the user's own may do anything
        rewards, pad_id = Rewards(run, tokenizer, pure_tools), tokenizer.pad_token_id
        rollout = open_rollout(run, model, saved, tokenizer)
        sampler = Episodes(run, rollout, tokenizer, tools)
        stream, baseline = None, partial(group_baseline, size=args.num_generations)
        if args.loss_type == "spo":
            stream = SingleStream(prompts.prompts, args.num_prompts)
            score = partial(sample_log_probs, run, model, pad_id)
            baseline = partial(remembered_baseline, stream=stream, score=score)
        optimizer = build_optimizer(model, args)
        state = TrainState(model, tokenizer, optimizer, fingerprint, saved, extra=stream)
        evaluate = partial(held_out_scores, run, sampler, held_out, rewards)
        loop = Loop(run, state, prompt_steps(run, prompts), evaluate, evaluate_first=True)
        transcripts = Transcripts(run, loop.done)
        epsilon, epsilon_high = args.epsilon, args.epsilon_high

        for step, items in loop:
            learning_rate = learning_rate_at(step, loop.num_steps, args)
            set_learning_rate(optimizer, loop.learning_rate_factor * learning_rate)
            if stream:  # the values decide which prompts a step has
                items = stream.tracker.draw(args.num_prompts, draw_seed(args.seed, step))
            rollout.refresh()  # the policy as it is now
            episodes = rewards.rate(sample_groups(run, sampler, prompts, items, step))
            episodes = run.ranks.gather(episodes)
            samples, advantages, metrics = baseline(episodes)
            experience = token_experience(samples, advantages)
            updates, trained, num_trained = [], [], 0
            for micro_batches, num_tokens, _ in minibatches(run, samples, experience, pad_id, step):
                for micro in micro_batches:
                    batch = run.to_device(micro)
                    with run.micro_step(is_last=micro is micro_batches[-1]):
                        log_probs, entropy, balance_loss = policy_outputs(
                            loop.net, batch, num_tokens, args.temperature
                        )
                        old, advantage = batch["old_log_probs"], batch["advantages"]
                        if args.loss_type == "cispo":
                            losses, is_clipped = cispo_loss(log_probs, old, advantage, epsilon_high)
                        else:
                            losses, is_clipped = clipped_loss(
                                log_probs - old, advantage, epsilon, epsilon_high
                            )
                        if reference:
                            ref_log_probs = reference_log_probs(reference, batch, args.temperature)
                            kl = kl_estimate(log_probs, ref_log_probs, args.kl_estimator)
                            losses = losses + args.beta * kl
                            loop.means.add(len(kl), kl=kl)
                        loss = losses.sum() / num_tokens + balance_loss
                        run.backward(loss)
                    approx_kl = kl_estimate(old, log_probs.detach(), "k3")  # drawn from the old
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
                transcripts.write(step + 1, episodes)
                metrics |= rollout_metrics(episodes, rollout) | episode_metrics(episodes)
                loop.advance(trained, num_trained, **({"loss": 0.0} | metrics | average(updates)))


if __name__ == "__main__":
    command(main)

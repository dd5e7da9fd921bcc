"""PPO: a policy samples completions, and a critic predicts at every token the reward to come.

At token t the critic, a second network with one number in place of the head, expects the return
V_t. What comes better or worse is the advantage, by generalised advantage estimation (Schulman et
al. 2016, eq. 16)

    delta_t = r_t + gamma V_{t+1} - V_t        A_t = delta_t + gamma lambda A_{t+1}

where r_t is the completion's reward at its last token, less --beta times the divergence from the
network that training began with at every token (Ouyang et al. 2022). The advantages are whitened
over the batch. With the ratio w = pi / pi_old of the probabilities now and when the token was
sampled, the policy's loss is -min(w A, clip(w, 1 - epsilon, 1 + epsilon) A), the critic's the
squared error, clipped likewise (Schulman et al. 2017, eq. 7 and 9). A step's completions serve for
--update_epochs x --num_minibatches updates, or until the policy has moved by more than --target_kl
from the one that sampled them.

    python trainer/train_ppo.py --from_weight out/quickstart/full_sft_tiny --max_steps 10  # 1 min
    python trainer/train_ppo.py --from_weight out/quickstart/full_sft_tiny --beta 0.02 \\
        --rewards answer=1 format=0.2
    python trainer/train_ppo.py --from_weight full_sft --data_path prompts.jsonl --beta 0.05 \\
        --rewards model:out/reward_minimind-3=1

What to look at: explained_variance, which begins at 0, since the critic knows nothing yet;
reward/answer, of sampled completions, and val_reward/answer on held-out prompts: from a model that
mostly leaves out the steps, 40 steps took the toy world's from 53 to 78% in five minutes on a CPU
(docs/LOG.md; scripts/evaluate_stages.py --stages ppo). A policy that runs away shows in approx_kl
and stopped_early.
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
    check_ratio,
    command,
    parse_args,
)


@dataclass
class PPOArgs(PolicyArgs):
    save_weight: str = "ppo"
    num_prompts: int = 128
    num_generations: int = 1
    num_minibatches: int = 4
    update_epochs: int = arg(
        2,
        "how often a step's completions are learned from",
        aliases=("num_ppo_epochs", "ppo_epochs", "ppo_update_iters"),
    )
    kl_estimator: str = arg(
        "k1",
        "how the divergence, part of the reward here, is estimated from the sampled tokens",
        choices=["k1", "k2", "k3"],
    )
    epsilon: float = arg(
        0.2,
        "clip range of the ratio: 1 - this to 1 + this",
        aliases=("cliprange", "clip_coef", "clip_epsilon", "clip"),
    )
    cliprange_value: float = arg(
        0.2, "clip range of the value around its value at the rollout", aliases=("value_clip",)
    )
    vf_coef: float = arg(0.5, "weight of the critic's loss", aliases=("value_weight",))
    gamma: float = arg(1.0, "discount of the next token's return", aliases=("discount",))
    gae_lambda: float = arg(0.95, "0: one-step error, 1: Monte Carlo return", aliases=("lam",))
    target_kl: float = arg(
        0.0,
        "a step's updates end when the policy has moved further, in nats per token; 0: never",
        aliases=("early_stop_kl",),
    )

    def check(self) -> None:
        """PolicyArgs.check, and the ranges of this stage's flags."""
        super().check()
        check_positive(self, "epsilon", "cliprange_value")
        check_not_negative(self, "vf_coef", "target_kl")
        check_ratio(self, "gamma", "gae_lambda")


check_flags(PPOArgs, __name__)  # --help need not wait for torch, which is imported below

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from dataset.toy.tools import TOY_TOOLS
from model.model_minimind import MiniMindForCausalLM
from trainer.losses.advantages import explained_variance, gae, whiten
from trainer.losses.policy import clipped_loss, kl_estimate, token_log_probs, value_loss
from trainer.rl.actor_critic import ActorCritic
from trainer.rl.experience import Experience, for_each_token, minibatches, sample_log_probs
from trainer.rl.rewards import Rewards
from trainer.rl.rollout import Sample, SingleTurn, rollout_metrics, sample_groups, total_rewards
from trainer.rl.setup import load_policy, open_prompts, open_rollout, prompt_steps
from trainer.rl.transcripts import Transcripts
from trainer.rl.validation import held_out_scores
from trainer.runtime.checkpoint import TrainState
from trainer.runtime.loop import Loop
from trainer.runtime.means import average
from trainer.runtime.optimizers import build_optimizer, learning_rate_at, set_learning_rate
from trainer.runtime.run import Run


def token_rewards(samples: list[Sample], kl: torch.Tensor, beta: float) -> torch.Tensor:
    """Rewards r_t [B, T]: -beta times the divergence kl [B, T], plus the sample's at its last."""
    rewards = -beta * kl
    counts = torch.tensor([sample.num_sampled for sample in samples])
    rows = counts.nonzero()[:, 0]
    rewards[rows, counts[rows] - 1] += total_rewards(samples).float()[rows]
    return rewards


def estimate_advantages(
    run: Run,
    model: ActorCritic,
    reference: MiniMindForCausalLM | None,
    pad_id: int,
    samples: list[Sample],
) -> tuple[Experience, dict[str, float]]:
    """(the experience that the updates need, metrics of the critic and the divergence)."""
    args, old_log_probs = run.args, [sample.old_log_probs for sample in samples]
    kl = [torch.zeros_like(x) for x in old_log_probs]
    if reference:
        theirs = sample_log_probs(run, reference, pad_id, samples)
        kl = [kl_estimate(x, y, args.kl_estimator) for x, y in zip(old_log_probs, theirs)]
    old_values = for_each_token(run, model.critic, model.critic, samples, pad_id)
    rewards = token_rewards(samples, pad_sequence(kl, batch_first=True), args.beta)
    values = pad_sequence(old_values, batch_first=True)  # [B, T], 0 behind the last token
    advantages = gae(rewards, F.pad(values, (0, 1)), args.gamma, args.gae_lambda)
    counts = [len(x) for x in old_log_probs]
    is_token = torch.arange(values.shape[1]) < torch.tensor(counts)[:, None]
    returns = (advantages + values)[is_token]
    metrics = {
        "explained_variance": explained_variance(values[is_token], returns),
        "value/mean": values[is_token].mean().item(),
    }
    if reference:
        metrics["kl"] = torch.cat(kl).mean().item()
    experience = {
        "old_log_probs": old_log_probs,
        "old_values": old_values,
        "returns": list(returns.split(counts)),
        "advantages": list(whiten(advantages[is_token]).split(counts)),
    }
    return experience, metrics


def main(argv: list[str] | None = None) -> None:
    args = parse_args(PPOArgs, argv)
    with Run(args) as run:
        policy, saved, tokenizer, reference = load_policy(run)
        prompts, held_out, fingerprint = open_prompts(run, policy, tokenizer)
        rewards = Rewards(run, tokenizer, TOY_TOOLS)
        sampler = SingleTurn(run, open_rollout(run, policy, saved, tokenizer))
        model, pad_id = ActorCritic(policy), tokenizer.pad_token_id
        optimizer = build_optimizer(model, args)
        state = TrainState(model, tokenizer, optimizer, fingerprint, saved, extra=model.critic)
        evaluate = partial(held_out_scores, run, sampler, held_out, rewards)
        loop = Loop(run, state, prompt_steps(run, prompts), evaluate, evaluate_first=True)
        transcripts = Transcripts(run, loop.done)

        for step, items in loop:
            learning_rate = learning_rate_at(step, loop.num_steps, args)
            set_learning_rate(optimizer, loop.learning_rate_factor * learning_rate)
            sampler.rollout.refresh()  # the policy as it is now
            samples = rewards.rate(sample_groups(run, sampler, prompts, items, step, 0))
            samples = run.ranks.gather(samples)
            experience, metrics = estimate_advantages(run, model, reference, pad_id, samples)
            updates, trained, num_trained = [], [], 0
            went_back = stopped_early = False
            for micro_batches, num_tokens, _ in minibatches(run, samples, experience, pad_id, step):
                for micro in micro_batches:
                    batch = run.to_device(micro)
                    with run.micro_step(is_last=micro is micro_batches[-1]):
                        logits, values, balance_loss = loop.net(batch, num_tokens)
                        log_probs, entropy = token_log_probs(
                            logits, batch["targets"], args.temperature
                        )
                        log_ratio = log_probs - batch["old_log_probs"]
                        losses, is_clipped = clipped_loss(
                            log_ratio, batch["advantages"], args.epsilon, args.epsilon
                        )
                        value_losses = value_loss(
                            values, batch["old_values"], batch["returns"], args.cliprange_value
                        )
                        loss = (losses + args.vf_coef * value_losses).sum() / num_tokens
                        loss = loss + balance_loss
                        run.backward(loss)
                    # the tokens were drawn from the old policy
                    approx_kl = kl_estimate(batch["old_log_probs"], log_probs.detach(), "k3")
                    token_means = {"approx_kl": approx_kl, "entropy": entropy}
                    token_means |= {"clip_fraction": is_clipped, "value_loss": value_losses}
                    loop.means.add(loss=loss)
                    loop.means.add(len(losses), **token_means)
                means = loop.means.reduce(run.ranks)
                metrics["approx_kl/last_update"] = means["approx_kl"]
                if args.target_kl and updates and means["approx_kl"] > args.target_kl:
                    optimizer.zero_grad(set_to_none=True)
                    stopped_early = True  # without this update
                    break
                update = run.clip_and_step(model, optimizer, means["loss"])
                updates.append(means)
                trained, num_trained = trained + micro_batches, num_trained + num_tokens
                if not loop.check(update, micro_batches):
                    went_back = True  # to the last checkpoint
                    break
            if went_back:
                continue
            transcripts.write(step + 1, samples)
            metrics |= rollout_metrics(samples, sampler.rollout) | average(updates)
            loop.advance(trained, num_trained, stopped_early=float(stopped_early), **metrics)


if __name__ == "__main__":
    command(main)

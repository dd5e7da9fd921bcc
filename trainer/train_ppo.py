"""PPO: a policy that writes answers, and a critic that says at every token what reward is to be expected.

At token t the critic, a second network with one number in place of the head, expects the return V_t. What came better or worse
than that is the advantage, with generalised advantage estimation (Schulman et al. 2016, eq. 16)

    delta_t = r_t + gamma V_{t+1} - V_t        A_t = sum_k (gamma lambda)^k delta_{t+k}

where r_t is the answer's reward at its last token, less --kl_weight times the divergence from the network that training began
with at every token (Ouyang et al. 2022). The advantages are whitened over the batch. With the ratio w = pi / pi_old of the
probabilities now and when the token was sampled, the policy's loss is -min(w A, clip(w, 1 - clip, 1 + clip) A), the critic's
the squared error, clipped likewise (Schulman et al. 2017, eq. 7 and 9). A step's answers serve for --update_epochs x
--num_minibatches updates, or until the policy has moved by more than --target_kl from the one that has answered.

    python trainer/train_ppo.py --from_weight out/quickstart/full_sft_tiny --max_steps 10       # a minute on a CPU
    python trainer/train_ppo.py --from_weight out/quickstart/full_sft_tiny --kl_weight 0.02 --rewards answer=1 format=0.2
    python trainer/train_ppo.py --from_weight full_sft --data_path prompts.jsonl --kl_weight 0.05 \\
        --rewards model:out/reward_minimind-3=1

What to look at: critic/explained_variance, which begins at 0, since the critic knows nothing yet; reward/answer, of what is
sampled, and val_reward/answer on held-out prompts: from a model that mostly leaves out the steps, 40 steps took the toy world's
from 53 to 78% in five minutes (docs/LOG.md; scripts/ladder.py --rungs ppo). A policy that runs away shows in kl/update and
stopped_early.
"""

import copy
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
from torch import nn

from model.model_lora import fold_adapters
from trainer.advantages import explained_variance, gae, whiten
from trainer.arguments import arg, check_not_negative, check_positive, check_share, command, parse_args
from trainer.checkpoint import Checkpoint
from trainer.experience import for_each_token, updates_of
from trainer.loop import Loop
from trainer.optim import build_optimizer
from trainer.policy import (
    PolicyArgs,
    Transcripts,
    held_out_scores,
    load_policy,
    open_rollout,
    prompt_sets,
    prompt_steps,
    reference_log_probs,
    sample_figures,
    sample_groups,
    token_sums,
)
from trainer.policy_losses import clipped_loss, kl_estimate, token_log_probs, value_loss
from trainer.rewards import Rewards
from trainer.run import Run
from trainer.weights import run_folder


@dataclass
class PPOArgs(PolicyArgs):
    save_weight: str = arg("ppo", "name of this run: it is saved in SAVE_DIR/SAVE_WEIGHT_PRESET")
    num_prompts: int = arg(128, "prompts of a step, of all ranks together")
    num_generations: int = arg(1, "answers that are sampled for each of them")
    num_minibatches: int = arg(4, "updates from a step's answers: each has its share of them")
    update_epochs: int = arg(2, "how often a step's answers are learned from")
    kl_kind: str = arg("k1", "how the divergence, part of the reward here, is estimated from the sampled tokens",
                       choices=["k1", "k2", "k3"])
    clip: float = arg(0.2, "a ratio further than this from 1 stops the policy's gradient")
    value_clip: float = arg(0.2, "a value further than this from that before the step stops the critic's")
    value_weight: float = arg(0.5, "weight of the critic's loss")
    discount: float = arg(1.0, "gamma: what the next token's return counts")
    gae_lambda: float = arg(0.95, "lambda: 0 trusts the critic, 1 the rewards")
    target_kl: float = arg(0.0, "a step's updates end when the policy has moved further than this, in nats per token; 0: never")

    def check(self):
        """PolicyArgs.check, and the ranges of this stage's flags."""
        super().check()
        check_positive(self, "clip", "value_clip")
        check_not_negative(self, "value_weight", "target_kl")
        check_share(self, "discount", "gae_lambda")


class Critic(nn.Module):
    """The expected return at each token: a copy of the policy's layers, and one number [D] -> 1 that begins at 0."""

    def __init__(self, policy):
        super().__init__()
        self.model = fold_adapters(copy.deepcopy(policy.model)).requires_grad_(True)  # adapters are the policy's alone
        self.value = nn.Linear(policy.config.hidden_size, 1).to(policy.device)
        nn.init.zeros_(self.value.weight)
        nn.init.zeros_(self.value.bias)

    def forward(self, batch):
        """Values [n] at a micro-batch's source positions: what is expected before the token there is drawn."""
        hidden = self.model(batch["input_ids"], position_ids=batch["position_ids"]).last_hidden_state[batch["is_source"]]
        return self.value(hidden)[:, 0].float()


class ActorCritic(nn.Module):
    """Policy and critic as one module, so that ranks average the gradients of both."""

    def __init__(self, policy):
        super().__init__()
        self.policy, self.critic = policy, Critic(policy)
        self.config = policy.config

    def gradient_checkpointing_enable(self, options):
        for part in (self.policy, self.critic.model):
            part.gradient_checkpointing_enable(options)

    def num_parameters(self):
        return sum(x.numel() for x in self.parameters())

    def forward(self, batch, num_tokens):
        """(logits [n, V] at the source positions, the balance loss's part of the policy's loss, values [n])."""
        out = self.policy(batch["input_ids"], position_ids=batch["position_ids"], labels=batch["labels"],
                          num_items_in_batch=num_tokens, skip_nll=True, logits_to_keep=batch["is_source"])
        return out.logits, out.loss, self.critic(batch)


def token_rewards(sample, log_ratio, args):
    """The rewards r_t of a sample's sampled tokens, float32 [n]: its total at the last one, less the divergence at each."""
    rewards = -args.kl_weight * log_ratio
    if len(rewards):
        rewards[-1] += sample.rewards["total"]
    return rewards


def token_columns(samples, model, reference, run, args, pad_id):
    """({name: [tensor of each sample]} of what the updates need, {name: figure} of the critic and the divergence)."""
    old = [sample.old_log_probs for sample in samples]
    values = for_each_token(model.critic, model, samples, run, args, pad_id)
    divergence = [torch.zeros_like(x) for x in old]
    if reference:
        def score(batch):
            return reference_log_probs(reference, batch, args.temperature)

        theirs = for_each_token(score, model, samples, run, args, pad_id)
        divergence = [kl_estimate(ours, other, args.kl_kind) for ours, other in zip(old, theirs)]
    counts = [len(x) for x in old]
    rewards = torch.cat([token_rewards(sample, x, args) for sample, x in zip(samples, divergence)])
    sequence = torch.arange(len(samples)).repeat_interleave(torch.tensor(counts))
    flat = torch.cat(values)
    advantages, returns = gae(rewards, flat, sequence, args.discount, args.gae_lambda)
    figures = {"critic/explained_variance": float(explained_variance(flat, returns)), "critic/value": flat.mean().item()}
    if reference:
        figures["kl/reference"] = torch.cat(divergence).mean().item()
    return {"old_log_probs": old, "old_values": values, "returns": list(returns.split(counts)),
            "advantages": list(whiten(advantages).split(counts))}, figures


def update(net, micro_batches, num_tokens, run, args):
    """Add up the gradients of one update; returns its sums [5] over the tokens of all ranks, for the log."""
    sums = torch.zeros(5, dtype=torch.float64, device=run.device)
    for micro in micro_batches:
        batch = run.to_device(micro)
        with run.micro_step(is_last=micro is micro_batches[-1]):
            logits, balance_loss, values = net(batch, num_tokens)
            log_probs, entropies = token_log_probs(logits, batch["targets"], args.temperature)
            losses, is_clipped = clipped_loss(log_probs - batch["old_log_probs"], batch["advantages"], args.clip, args.clip)
            value_losses = value_loss(values, batch["old_values"], batch["returns"], args.value_clip)
            loss = (losses + args.value_weight * value_losses).sum() / num_tokens + balance_loss
            run.backward(loss)
        moved = kl_estimate(batch["old_log_probs"], log_probs.detach(), "k3")  # the tokens are the old policy's
        sums += token_sums(num_tokens, loss, moved, entropies, is_clipped, value_losses)
    return run.ranks.sum_tensor(sums)


def main(argv=None):
    args = parse_args(PPOArgs, argv)
    with Run(args) as run:
        policy, saved, tokenizer, reference = load_policy(args, run)
        folder, pad_id = run_folder(args, policy.config, run.ranks), tokenizer.pad_token_id
        training, held_out, data = prompt_sets(args, run, policy, tokenizer)
        rewards = Rewards(args, tokenizer, run)
        model = ActorCritic(policy)
        optimizer = build_optimizer(model, args)
        checkpoint = Checkpoint(folder, args, run, saved, tokenizer, optimizer, data, extra=model.critic)
        steps = prompt_steps(training, args)
        run.say(f"{folder}: {policy.num_parameters() / 1e6:.1f}M parameters and as many in the critic, {len(steps)} steps of "
                f"{args.num_prompts * args.num_generations} answers on {run}; {run.memory_advice(model)}")
        net, rollout = run.wrap(model, optimizer), open_rollout(saved, policy, tokenizer, run, args)

        def evaluate(index):
            return held_out_scores(rollout, held_out, rewards, run, args)

        with Loop(folder, args, run, model, optimizer, checkpoint, steps, data, evaluate if held_out else None,
                  evaluate_first=True) as loop:
            transcripts = Transcripts(folder, args, run, loop.done)
            for items in loop:
                rollout.refresh()
                samples = sample_groups(rollout, training, items, rewards, run, args, loop.done)
                columns, figures = token_columns(samples, model, reference, run, args, pad_id)
                updates, trained, num_trained, is_alive, moved = [], [], 0, True, 0.0
                for micro_batches, num_tokens, _ in updates_of(samples, columns, run, args, pad_id, loop.done):
                    sums = update(net, micro_batches, num_tokens, run, args)
                    moved = sums[1].item()
                    if args.target_kl and updates and moved > args.target_kl:  # the same on all ranks
                        optimizer.zero_grad(set_to_none=True)
                        break
                    updates.append(sums)
                    trained, num_trained = trained + micro_batches, num_trained + num_tokens
                    if not (is_alive := loop.apply(sums[0].item(), micro_batches)):
                        break
                if not is_alive:  # the run has gone back to its last checkpoint
                    continue
                names = ("kl/update", "entropy", "clip_share", "critic/loss")
                loss, *means = torch.stack(updates).mean(0).tolist()
                transcripts.write(loop.done + 1, samples)
                figures["kl/last_update"] = moved  # if the step has ended early, that of the update that it was spared
                planned = args.update_epochs * min(args.num_minibatches, len(samples))
                loop.advance(loss, num_trained, trained, **figures, **sample_figures(samples, rollout), **dict(zip(names, means)),
                             stopped_early=float(len(updates) < planned))


if __name__ == "__main__":
    command(main)

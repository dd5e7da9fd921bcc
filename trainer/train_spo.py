"""SPO: one answer to each prompt, compared with what that prompt is known to earn.

GRPO asks every prompt several times to learn what was to be expected, and groups that are all right or all wrong were asked
in vain. Here that is remembered (Xu and Ding 2025, "Single-stream policy optimization"): each prompt has a value v, a running
mean of its rewards that forgets the faster, the further the policy has moved since it last answered that prompt
(value_tracker.py). The advantage of an answer with the reward r is

    A = r - v,   then whitened over the batch

and all of its tokens get it, in PPO's clipped loss. Prompts are drawn in proportion to sqrt(v (1 - v)) + 0.05: those that are
sometimes solved teach most. Before the first step --initial_answers to every prompt say where the values begin.

    python trainer/train_spo.py --from_weight out/quickstart/full_sft_tiny --max_steps 10       # a minute on a CPU
    python trainer/train_spo.py --from_weight out/quickstart/full_sft_tiny --initial_answers 2 --num_prompts 64
    python trainer/train_spo.py --from_weight reason --enable_thinking on --data_path maths.jsonl --max_new_tokens 1024 \\
        --max_seq_len 2048 --num_prompts 256

What to look at: reward/answer is that of the prompts which were drawn, and those that are solved are drawn less and less;
value/mean is what all prompts are thought to earn, val_reward/answer that of held-out ones: from a model that mostly leaves out
the steps, 60 steps took the toy world's from 53 to 74% in five minutes (docs/LOG.md; scripts/ladder.py --rungs spo). Rewards
must lie between 0 and 1.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import torch

from trainer.arguments import arg, check_not_negative, check_positive, command, parse_args
from trainer.checkpoint import Checkpoint
from trainer.experience import columns_of, for_each_token, updates_of
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
    rate,
    reference_log_probs,
    sample_figures,
    sample_groups,
    token_sums,
)
from trainer.policy_losses import clipped_loss, kl_estimate
from trainer.rewards import Rewards
from trainer.rollout import answer_samples, draw_seed, share_of
from trainer.run import Run
from trainer.value_tracker import SingleStream, check_success_rewards
from trainer.weights import run_folder

AT_ONCE = 1024  # prompts, of the first answers


@dataclass
class SPOArgs(PolicyArgs):
    save_weight: str = arg("spo", "name of this run: it is saved in SAVE_DIR/SAVE_WEIGHT_PRESET")
    num_prompts: int = arg(128, "prompts of a step, of all ranks together")
    num_generations: int = arg(1, "one answer to each prompt: no group is needed")
    initial_answers: int = arg(8, "answers to every prompt before the first step, from which its value begins; 0: at 1/2")
    clip_low: float = arg(0.2, "a ratio below 1 - this stops the gradient")
    clip_high: float = arg(0.28, "a ratio above 1 + this stops the gradient")

    def check(self):
        """PolicyArgs.check, and the ranges of this stage's flags."""
        super().check()
        check_not_negative(self, "initial_answers")
        check_positive(self, "clip_low", "clip_high")
        check_success_rewards(self)
        if self.num_generations != 1:
            raise ValueError("--num_generations: this stage takes one answer to each prompt; leave it out, or take train_grpo.py")


def first_values(stream, rollout, dataset, rewards, run, args):
    """Begin the values with --initial_answers to every prompt, some prompts after others; the ranks share the work."""
    n = args.initial_answers
    rollout.refresh()
    for start in range(0, len(dataset), AT_ONCE):
        items = list(range(start, min(start + AT_ONCE, len(dataset))))
        asked = [(item, draw_seed(args.seed, "first", item, i)) for item in share_of(items, run.ranks) for i in range(n)]
        samples = rate(answer_samples(rollout, dataset, [item for item, _ in asked], [seed for _, seed in asked],
                                      args.max_new_tokens, args.thinking), rewards)
        stream.last.remember(run.ranks.gather(samples[n - 1::n]))
        totals = run.ranks.gather([sample.rewards["total"] for sample in samples])
        stream.tracker.start(items, torch.tensor(totals, dtype=torch.float64).view(-1, n))
        run.say(f"first answers: {n} to each of {items[-1] + 1:,} of {len(dataset):,} prompts, worth {np.mean(totals):.3f}")


def update(net, reference, micro_batches, num_tokens, run, args):
    """Add up the gradients of one update; returns its sums [5] over the tokens of all ranks, for the log."""
    sums = torch.zeros(5, dtype=torch.float64, device=run.device)
    for micro in micro_batches:
        batch = run.to_device(micro)
        with run.micro_step(is_last=micro is micro_batches[-1]):
            log_probs, entropies, balance_loss = policy_outputs(net, batch, num_tokens, args.temperature)
            log_ratio = log_probs - batch["old_log_probs"]
            losses, is_clipped = clipped_loss(log_ratio, batch["advantages"], args.clip_low, args.clip_high)
            kl = torch.zeros_like(losses)
            if reference:
                kl = kl_estimate(log_probs, reference_log_probs(reference, batch, args.temperature), args.kl_kind)
            loss = (losses + args.kl_weight * kl).sum() / num_tokens + balance_loss
            run.backward(loss)
        moved = kl_estimate(batch["old_log_probs"], log_probs.detach(), "k3")  # the tokens are the old policy's
        sums += token_sums(num_tokens, loss, kl, moved, entropies, is_clipped)
    return run.ranks.sum_tensor(sums)


def main(argv=None):
    args = parse_args(SPOArgs, argv)
    with Run(args) as run:
        model, saved, tokenizer, reference = load_policy(args, run)
        folder, pad_id = run_folder(args, model.config, run.ranks), tokenizer.pad_token_id
        training, held_out, data = prompt_sets(args, run, model, tokenizer)
        rewards, stream = Rewards(args, tokenizer, run), SingleStream(training.prompts, args.num_prompts)
        optimizer = build_optimizer(model, args)
        checkpoint = Checkpoint(folder, args, run, saved, tokenizer, optimizer, data, extra=stream)
        steps = prompt_steps(training, args)
        run.say(f"{folder}: {model.num_parameters() / 1e6:.1f}M parameters, {len(steps)} steps of {args.num_prompts} answers "
                f"on {run}; {run.memory_advice(model)}")
        net, rollout = run.wrap(model, optimizer), open_rollout(saved, model, tokenizer, run, args)

        def evaluate(index):
            return held_out_scores(rollout, held_out, rewards, run, args)

        def score(samples):
            return for_each_token(lambda batch: policy_outputs(model, batch, 1, args.temperature)[0], model, samples, run, args,
                                  pad_id)

        with Loop(folder, args, run, model, optimizer, checkpoint, steps, data, evaluate if held_out else None,
                  evaluate_first=True) as loop:
            transcripts = Transcripts(folder, args, run, loop.done)
            if loop.done == 0 and args.initial_answers:
                first_values(stream, rollout, training, rewards, run, args)
            for _ in loop:  # which prompts a step has, the values decide
                items = stream.tracker.draw(args.num_prompts, draw_seed(args.seed, loop.done))
                rollout.refresh()
                samples = sample_groups(rollout, training, items, rewards, run, args, loop.done)
                advantages = stream.advantages(samples, score).tolist()
                columns = columns_of(samples, advantages)
                updates, trained, num_trained = [], [], 0
                for micro_batches, num_tokens, _ in updates_of(samples, columns, run, args, pad_id, loop.done):
                    updates.append(update(net, reference, micro_batches, num_tokens, run, args))
                    trained, num_trained = trained + micro_batches, num_trained + num_tokens
                    if not loop.apply(updates[-1][0].item(), micro_batches):
                        break  # the run has gone back to its last checkpoint
                else:
                    loss, kl, moved, entropy, clipped = torch.stack(updates).mean(0).tolist()
                    figures = {"kl/reference": kl} if reference else {}
                    figures |= {"kl/update": moved, "entropy": entropy, "clip_share": clipped,
                                "value/mean": stream.tracker.values().mean().item()}
                    transcripts.write(loop.done + 1, samples)
                    loop.advance(loss, num_trained, trained, **sample_figures(samples, rollout), **figures)


if __name__ == "__main__":
    command(main)

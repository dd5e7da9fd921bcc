"""Reinforcement learning of an agent: it calls tools, sees their results, calls again, answers, and is paid at the end.

An episode begins with a question and a list of tools. Each reply of the policy is read; calls in it are run, their results
become the next messages, and the policy goes on, at most --max_turns times. What the policy wrote is trained on, all of it with
the episode's one advantage; what the tools answered is context, no action of the policy, and has no loss. The next reply is
sampled after the very tokens of the earlier ones, not after their text tokenized again, so that the log-probabilities are those
of the sequence which is trained on. Advantages and losses are those of train_grpo.py (grpo, cispo), or of train_spo.py with one
episode for each question (spo); all of an update's tokens count the same.

    python trainer/train_agent.py --from_weight out/quickstart/full_sft_tiny --max_steps 4      # a minute on a CPU
    python trainer/train_agent.py --from_weight out/quickstart/full_sft_tiny --loss_type spo --num_prompts 128
    python trainer/train_agent.py --from_weight full_sft --tools my_tools.py --data_path questions.jsonl --tool_seconds 5

Tools are Python functions (dataset/tools.py says how to write them), run with a time limit; the default are the toy world's. Rows
are {"conversations": [system message with "tools", question], "gt": [values of the answer], "calls": [calls that are needed]}.
What to look at: reward/tools, the share of the needed calls that were made, beside reward/answer; turns/mean beside what the
questions need. From a model that guesses where it should call, 20 steps took held-out questions of one call from 41 to 96% and
those of two from 11 to 85% in five minutes (docs/LOG.md; scripts/ladder.py --rungs agent).
"""

import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import torch

from dataset.chat_format import encode_conversation, encode_prompt
from dataset.tools import ToolBox, load_tools
from dataset.toy_scorer import assistant_message
from dataset.toy_tools import TOY_TOOLS
from trainer.advantages import group_advantages, has_spread
from trainer.arguments import arg, check_positive, command, parse_args
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
    reward_table,
    sample_figures,
    token_sums,
)
from trainer.policy_losses import cispo_loss, clipped_loss, kl_estimate
from trainer.rewards import Rewards, replies, tools_of
from trainer.rollout import Sample, draw_seed, share_of
from trainer.run import Run
from trainer.value_tracker import SingleStream, check_success_rewards
from trainer.weights import run_folder

CLIP = {"grpo": (0.2, 0.2), "cispo": (1.0, 4.0), "spo": (0.2, 0.28)}  # ratios below 1 - low and above 1 + high


@dataclass
class AgentArgs(PolicyArgs):
    save_weight: str = arg("agent", "name of this run: it is saved in SAVE_DIR/SAVE_WEIGHT_PRESET")
    max_seq_len: int = arg(1024, "longest episode, in tokens; also the length of packed rows")
    num_generations: int | None = arg(None, "episodes for each prompt (default: 8; spo: 1)")
    rewards: list[str] = arg(["answer=0.7", "tools=0.3"], "what an episode is worth: a weighted sum of NAME=WEIGHT; see "
                             "trainer/rewards.py", nargs="+")
    loss_type: str = arg("grpo", "advantages within a group, with the clipped loss or CISPO's; or against a remembered value",
                         choices=list(CLIP))
    tools: str = arg("", "a Python file with tools of your own (default: those of the toy world)")
    tool_seconds: float = arg(5.0, "how long a tool may take")
    max_turns: int = arg(4, "replies of an episode, at most: calls in the last one are not run")

    def check(self):
        """PolicyArgs.check, and the ranges of this stage's flags."""
        if self.num_generations is None:
            self.num_generations = 1 if self.loss_type == "spo" else 8
        super().check()
        check_positive(self, "tool_seconds", "max_turns")
        if self.loss_type == "spo":
            check_success_rewards(self)
        if (self.num_generations == 1) != (self.loss_type == "spo"):
            raise ValueError(f"--num_generations {self.num_generations} with --loss_type {self.loss_type}: spo has one episode "
                             "for each prompt, the others compare several")


class Episodes:
    """Conversations with tools, held side by side: `episodes(dataset, items, seeds)` -> a Sample of each."""

    def __init__(self, rollout, tokenizer, args):
        self.rollout, self.tokenizer, self.args = rollout, tokenizer, args
        self.tools = (load_tools(args.tools) if args.tools else TOY_TOOLS).tools
        self.opened = "<think>\n" if args.thinking else ""  # by the prompt of every reply
        stub = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
        ids = encode_conversation(tokenizer, stub)[0]
        self.stub, self.stub_end = stub, len(ids) - ids[::-1].index(tokenizer.eos_token_id)  # right after the reply's end mark

    def check(self, datasets):
        """ValueError unless the rows of these offer tools, all of which are there."""
        offered = {name for dataset in datasets for row in dataset.rows for name in tools_of(row)}
        if not offered:
            raise ValueError('no row offers a tool: put "tools" on its system message, or take train_grpo.py for rows without')
        if missing := sorted(offered - set(self.tools)):
            raise ValueError(f"rows offer {', '.join(missing)}, and {self.args.tools or 'the toy world'} has "
                             f"{', '.join(self.tools)}: give a file that has all of them with --tools")

    def __call__(self, dataset, items, seeds, temperature=None):
        samples = [Sample(dataset.rows[item], dataset.prompts[item], [], [], [], "", list(dataset.rows[item]["conversations"]),
                          False, item) for item in items]
        alive = list(range(len(samples)))
        for turn in range(self.args.max_turns):
            answers = self.rollout([samples[i].prompt + samples[i].tokens for i in alive],
                                   [draw_seed(seeds[i], turn) for i in alive], self.args.max_new_tokens, temperature)
            alive = [i for i, answer in zip(alive, answers) if self.goes_on(samples[i], answer)]
            is_last = turn == self.args.max_turns - 1
            alive = [i for i in alive if not is_last and self.run_calls(samples[i])]
        return samples

    def goes_on(self, sample, answer):
        """Add a reply to an episode; True if it holds calls, whose results the model must see before the episode is whole."""
        sample.tokens += answer.tokens
        sample.is_sampled += [True] * len(answer.tokens)
        sample.log_probs += answer.log_probs
        sample.text = self.opened + answer.text
        sample.messages.append(assistant_message(sample.text, tools=bool(tools_of(sample.row))))
        has_calls = "tool_calls" in sample.messages[-1]
        sample.is_complete = answer.is_complete and not has_calls
        return answer.is_complete and has_calls

    def run_calls(self, sample):
        """Run the calls of the last reply, of tools that the row offers; True if what came of them, and a reply, fit.

        The results become tokens that nobody sampled; where no reply can follow, they are in the messages alone.
        """
        box = ToolBox([self.tools[name] for name in tools_of(sample.row)], self.args.tool_seconds)
        results = [{"role": "tool", "content": box.run(call["name"], call["arguments"])}
                   for call in sample.messages[-1]["tool_calls"]]
        sample.messages += results
        ids = encode_prompt(self.tokenizer, [*self.stub, *results], enable_thinking=self.args.thinking)[self.stub_end:]
        length = len(sample.prompt) + len(sample.tokens) + len(ids)
        if length + self.args.max_new_tokens > self.args.max_seq_len:
            return False
        sample.tokens += ids
        sample.is_sampled += [False] * len(ids)
        sample.log_probs += [0.0] * len(ids)
        return True


def hold_episodes(episodes, dataset, items, rewards, run, args, step):
    """The Samples of all ranks, with their rewards: --num_generations for each of `items`, one prompt after another."""
    mine = share_of(list(enumerate(items)), run.ranks)
    asked = [(item, draw_seed(args.seed, step, place, n)) for place, item in mine for n in range(args.num_generations)]
    samples = episodes(dataset, [item for item, _ in asked], [seed for _, seed in asked])
    return run.ranks.gather(rate(samples, rewards))


def figures_of(samples, rollout):
    """`sample_figures`, and how many replies and calls an episode has."""
    said = [replies(sample) for sample in samples]
    calls = [sum(len(message.get("tool_calls", ())) for message in one) for one in said]
    return sample_figures(samples, rollout) | {"turns/mean": float(np.mean([len(one) for one in said])),
                                      "calls/mean": float(np.mean(calls))}


def group_values(samples, args):
    """(the samples of groups whose rewards differ, which alone say something; an advantage for each)."""
    table = reward_table(samples, args.num_generations)
    kept = has_spread(table)
    numbers = kept.repeat_interleave(args.num_generations).nonzero()[:, 0].tolist()
    return [samples[i] for i in numbers], group_advantages(table[kept], "group").flatten().tolist()


def update(net, reference, micro_batches, num_tokens, run, args):
    """Add up the gradients of one update: its sums [5] over the sampled tokens of all ranks, for the log."""
    low, high = CLIP[args.loss_type]
    sums = torch.zeros(5, dtype=torch.float64, device=run.device)
    for micro in micro_batches:
        batch = run.to_device(micro)
        with run.micro_step(is_last=micro is micro_batches[-1]):
            log_probs, entropies, balance_loss = policy_outputs(net, batch, num_tokens, args.temperature)
            if args.loss_type == "cispo":
                losses, is_clipped = cispo_loss(log_probs, batch["old_log_probs"], batch["advantages"], high)
            else:
                losses, is_clipped = clipped_loss(log_probs - batch["old_log_probs"], batch["advantages"], low, high)
            kl = torch.zeros_like(losses)
            if reference:
                kl = kl_estimate(log_probs, reference_log_probs(reference, batch, args.temperature), args.kl_kind)
            loss = (losses + args.kl_weight * kl).sum() / num_tokens + balance_loss
            run.backward(loss)
        moved = kl_estimate(batch["old_log_probs"], log_probs.detach(), "k3")  # the tokens are the old policy's
        sums += token_sums(num_tokens, loss, kl, moved, entropies, is_clipped)
    return run.ranks.sum_tensor(sums)


def main(argv=None):
    args = parse_args(AgentArgs, argv)
    with Run(args) as run:
        model, saved, tokenizer, reference = load_policy(args, run)
        folder, pad_id = run_folder(args, model.config, run.ranks), tokenizer.pad_token_id
        training, held_out, data = prompt_sets(args, run, model, tokenizer, "agent")
        rewards = Rewards(args, tokenizer, run)
        stream = SingleStream(training.prompts, args.num_prompts) if args.loss_type == "spo" else None
        optimizer = build_optimizer(model, args)
        checkpoint = Checkpoint(folder, args, run, saved, tokenizer, optimizer, data, extra=stream)
        steps = prompt_steps(training, args)
        run.say(f"{folder}: {model.num_parameters() / 1e6:.1f}M parameters, {len(steps)} steps of {args.num_prompts} prompts x "
                f"{args.num_generations} episodes on {run}; {run.memory_advice(model)}")
        net = run.wrap(model, optimizer)
        episodes = Episodes(open_rollout(saved, model, tokenizer, run, args), tokenizer, args)
        episodes.check([training, *held_out.values()])

        def evaluate(index):
            return held_out_scores(episodes.rollout, held_out, rewards, run, args, lambda view, items: episodes(
                view, items, [0] * len(items), temperature=0))

        def score(samples):
            return for_each_token(lambda batch: policy_outputs(model, batch, 1, args.temperature)[0], model, samples, run, args,
                                  pad_id)

        with Loop(folder, args, run, model, optimizer, checkpoint, steps, data, evaluate if held_out else None,
                  evaluate_first=True) as loop:
            transcripts = Transcripts(folder, args, run, loop.done)
            for items in loop:
                if stream:
                    items = stream.tracker.draw(args.num_prompts, draw_seed(args.seed, loop.done))
                episodes.rollout.refresh()
                everything = hold_episodes(episodes, training, items, rewards, run, args, loop.done)
                if stream:
                    samples, advantages = everything, stream.advantages(everything, score).tolist()
                else:
                    samples, advantages = group_values(everything, args)
                columns = columns_of(samples, advantages)
                updates, trained, num_trained = [], [], 0
                for micro_batches, num_tokens, _ in updates_of(samples, columns, run, args, pad_id, loop.done):
                    updates.append(update(net, reference, micro_batches, num_tokens, run, args))
                    trained, num_trained = trained + micro_batches, num_trained + num_tokens
                    if not loop.apply(updates[-1][0].item(), micro_batches):
                        break  # the run has gone back to its last checkpoint
                else:
                    loss, kl, moved, entropy, clipped = torch.stack(updates).mean(0).tolist() if updates else [0.0] * 5
                    figures = {"kl/reference": kl} if reference else {}
                    figures |= {"kl/update": moved, "entropy": entropy, "clip_share": clipped}
                    figures |= ({"value/mean": stream.tracker.values().mean().item()} if stream else
                                {"degenerate_share": 1 - len(samples) / len(everything)})
                    transcripts.write(loop.done + 1, everything)
                    loop.advance(loss, num_trained, trained, **figures_of(everything, episodes.rollout), **figures)


if __name__ == "__main__":
    command(main)

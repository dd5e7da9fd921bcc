"""Reasoning distillation: the network learns to think before it answers, from another model's worked-out thoughts.

Fine-tuning on rows with `reasoning_content`, as a large model wrote it and somebody checked it (DeepSeek-AI 2025, "R1",
section 2.4): for small networks that does more than reinforcement learning of their own. The thought stands between
<think> and </think> and is trained on like the answer. With y the assistant's tokens and x what precedes them,

    loss = sum_t w_t * -log p(y_t | x, y_<t) / sum_t w_t,    w_t = --mark_weight for <think> and </think>, else 1

where both sums are over the whole optimizer step; the marks are few, and without them the rest of the format is lost.
--direct_share of the rows are trained without their thought, behind the empty think block that the chat template writes
when it is told not to think, and so are rows that have none. So one model does both, by the template's switch; left
to itself, it thinks.

    python trainer/train_reason.py --save_dir out/quickstart --batch_size 3 --epochs 4 --learning_rate 1e-3
    python trainer/train_reason.py --data_path r1_traces.jsonl chat.jsonl@0.2 --max_seq_len 2048 --gradient_checkpointing
    python trainer/train_reason.py --direct_share 0 --mark_weight 10         # always thinks, and the marks count tenfold
    python eval_llm.py --weight reason --save_dir out/quickstart --benchmark toy --open_thinking 1    # or 0: at once

The first takes about a minute or two on a CPU, on the toy world, after scripts/quickstart.py.

What to expect: the format comes within a hundred steps. Each validation says how many answers to held-out prompts keep
to it (`val_format/thinking`, `val_format/direct`). With thinking on, the same model answers far more of what takes several
steps (sums, dates, word problems) than with thinking off: 80 against 28% in scripts/ladder.py. What is not among the rows
is forgotten: add rows of the stage before.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
import torch.nn.functional as F

from dataset.chat_format import encode_prompt
from dataset.inspect_rows import show_rows
from dataset.packing import IGNORE, PackedBatches
from dataset.reason_dataset import ReasonDataset
from dataset.toy_world import write_world
from trainer.arguments import TrainArgs, arg, check_not_negative, check_positive, check_share, command, parse_args
from trainer.checkpoint import Checkpoint
from trainer.evaluation import validate, validation_sets
from trainer.loop import Loop
from trainer.optim import build_optimizer
from trainer.run import Run, evaluating
from trainer.steps import count_targets, step_batches
from trainer.weights import load_model, run_folder

TOY = ROOT / "dataset" / "toy_mini"


@dataclass
class ReasonArgs(TrainArgs):
    data_path: list[str] = arg([], "rows of conversations; FILE@0.4 takes that share of them (default: the toy world)", nargs="+")
    from_weight: str = arg("full_sft", "start from this run (a name in SAVE_DIR), checkpoint folder or .pth file")
    save_weight: str = arg("reason", "name of this run: it is saved in SAVE_DIR/SAVE_WEIGHT_PRESET")
    learning_rate: float = arg(5e-4, "peak learning rate")
    val_share: float = arg(0.03, "share of the documents held out for validation; 0: none")
    mark_weight: float = arg(1.0, "how often <think> and </think> count in the loss")
    direct_share: float = arg(0.3, "share of the rows with reasoning that are trained without it, as direct answers")
    empty_think_share: float = arg(1.0, "share of the rows without reasoning that are trained as direct answers")
    format_prompts: int = arg(32, "held-out prompts that are answered at a validation to see whether the format is kept; 0: none")
    format_tokens: int = arg(256, "longest of these answers, in tokens")

    def check(self):
        """TrainArgs.check, and the stage's own flags."""
        super().check()
        check_positive(self, "mark_weight", "format_tokens")
        check_not_negative(self, "format_prompts")
        check_share(self, "direct_share", "empty_think_share")


def weighted_loss(net, micro, marks, mark_weight, num_targets, total_weight, balance_weight):
    """This micro-batch's part of the step's loss; `marks` [2] are the ids that weigh more, `total_weight` is sum_t w_t.

    The head runs once on all targets, and once more on the marks for what they count beyond 1. balance_weight: of a mixture's
    balance loss, which is a mean over the step's `num_targets` whatever they weigh.
    """
    if mark_weight == 1:
        return net(**micro, num_items_in_batch=num_targets, skip_logits=True).loss
    targets = F.pad(micro["labels"][:, 1:], (0, 1), value=IGNORE)  # B T
    is_mark = torch.isin(targets, marks)
    out = net(**micro, num_items_in_batch=total_weight, logits_to_keep=is_mark)  # out.logits: n_marks V
    mark_nll = F.cross_entropy(out.logits.float(), targets[is_mark], reduction="sum")
    loss = out.loss + (mark_weight - 1) * mark_nll / total_weight
    if out.aux_loss is not None:  # it was divided by the total weight too
        loss = loss + balance_weight * out.aux_loss * (total_weight / num_targets - 1)
    return loss


def count_marks(micro_batches, tokenizer):
    """How many targets of these micro-batches are <think> or </think>."""
    marks = torch.tensor(mark_ids(tokenizer))
    return sum(int(torch.isin(micro["labels"], marks).sum()) for micro in micro_batches)


def bare_prompts(views, tokenizer, count):
    """Up to `count` prompts of held-out rows, lists of ids that end where the assistant begins its last message."""
    _, empty_block = switch_ends(tokenizer)
    rows = [view[i] for view in views for i in range(min(len(view), -(-count // len(views))))][:count]
    prompts = []
    for row in rows:
        is_target = row["labels"] != IGNORE
        begin = int((is_target[1:] & ~is_target[:-1]).nonzero()[0][-1]) + 1
        ids = row["input_ids"][:begin].tolist()
        prompts.append(ids[:-len(empty_block)] if ids[-len(empty_block):] == empty_block else ids)
    return prompts


def switch_ends(tokenizer):
    """What a prompt ends with, as ids, that asks for a thought, and that asks for a direct answer."""
    question = [{"role": "user", "content": "?"}]
    bare = len(encode_prompt(tokenizer, question))
    return [encode_prompt(tokenizer, question, enable_thinking=thinking)[bare:] for thinking in (True, False)]


def keeps_format(answer, thinking, tokenizer):
    """Whether an answer, as ids up to its end token, has the form that its prompt asked for.

    thinking: the block, which the prompt opened, is closed once, holds a thought, and an answer follows that ends. Else
    there is no mark of a block.
    """
    opening, closing = (answer.count(mark) for mark in mark_ids(tokenizer))
    if not thinking:
        return opening == closing == 0
    if opening or closing != 1 or answer[-1] != tokenizer.eos_token_id:
        return False
    at = answer.index(mark_ids(tokenizer)[1])
    return all(tokenizer.decode(part).strip() for part in (answer[:at], answer[at + 1:-1]))


def mark_ids(tokenizer):
    """The ids of <think> and </think>."""
    return tokenizer.convert_tokens_to_ids(["<think>", "</think>"])


def format_shares(model, tokenizer, prompts, run, args):
    """{"val_format/thinking", "val_format/direct"}: share of greedy answers that keep the format which the prompt asks for."""
    shares = {}
    for name, end in zip(("thinking", "direct"), switch_ends(tokenizer)):
        kept = 0
        for start in range(0, len(prompts), args.batch_size):
            answers = greedy_ids(model, [ids + end for ids in prompts[start:start + args.batch_size]], args.format_tokens, run)
            kept += sum(keeps_format(answer, name == "thinking", tokenizer) for answer in answers)
        shares[f"val_format/{name}"] = kept / len(prompts)
    return shares


def greedy_ids(model, prompts, max_new_tokens, run):
    """Greedy answers to prompts, both lists of ids, up to and with the end token; by `generate`, as in `sample`."""
    config, longest = model.generation_config, max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=run.device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=run.device)
    with evaluating(model), run.autocast():
        out = model.generate(ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=0)
    answers = []
    for row in out[:, longest:].tolist():
        end = next((i for i, token in enumerate(row) if token in config.eos_token_id), len(row))
        answers.append(row[:end + 1])
    return answers


def main(argv=None):
    args = parse_args(ReasonArgs, argv)
    with Run(args) as run:
        if not args.data_path:
            run.ranks.from_first(lambda: write_world("mini", TOY))
            args.data_path = [str(TOY / "reason_train.jsonl")]
        model, tokenizer = load_model(args, run.device)
        folder = run_folder(args, model.config, run.ranks)

        def build(paths):
            return ReasonDataset(
                paths, tokenizer, args.max_seq_len, bad_rows=args.bad_rows, cache_dir=args.cache_dir, num_proc=args.num_proc,
                seed=args.seed, direct_share=args.direct_share, empty_think_share=args.empty_think_share)

        dataset = build(args.data_path)
        if args.inspect:
            return show_rows(dataset, tokenizer, args.inspect)
        run.say(dataset.report)
        training, held_out = validation_sets(args, dataset, build)
        prompts = bare_prompts(list(held_out.values()), tokenizer, args.format_prompts) if held_out else []
        optimizer = build_optimizer(model, args)
        checkpoint = Checkpoint(folder, args, run, model, tokenizer, optimizer, training.fingerprint)
        batches = step_batches(PackedBatches, training, args, run, tokenizer, checkpoint)
        run.say(f"{folder}: {model.num_parameters() / 1e6:.1f}M parameters, {len(batches)} steps on {run}, "
                f"{batches.padding_share:.1%} of the positions are padding; {run.memory_advice(model)}")
        net = run.wrap(model, optimizer)
        marks = torch.tensor(mark_ids(tokenizer), device=run.device)

        def evaluate(index):
            scores, text = validate(model, tokenizer, held_out, run, args, index)
            if prompts:
                shares = format_shares(model, tokenizer, prompts, run, args)
                scores, text = scores | shares, "{}\nformat kept: {:.0%} thinking, {:.0%} direct".format(text, *shares.values())
            return scores, text

        with Loop(folder, args, run, model, optimizer, checkpoint, batches, training.fingerprint,
                  evaluate if held_out else None) as loop:
            for micro_batches in loop:
                num_targets = run.sum(count_targets(micro_batches))  # of the whole step: all micro-batches of all ranks
                num_marks = run.sum(count_marks(micro_batches, tokenizer))
                total_weight = num_targets + (args.mark_weight - 1) * num_marks
                loss = 0.0
                for micro in micro_batches:
                    with run.micro_step(is_last=micro is micro_batches[-1]):
                        part = weighted_loss(net, run.to_device(micro), marks, args.mark_weight, num_targets, total_weight,
                                             model.config.router_aux_loss_coef)
                        run.backward(part)
                    loss += part.detach()
                loop.update(run.sum(loss), num_targets, micro_batches)  # clip, step, log, validate, save


if __name__ == "__main__":
    command(main)

"""Speed of rollouts beside transformers: completion tokens per second of the engine and of `generate()`, same weights, one run.

    python scripts/bench_rollout.py                                                           # minimind2-small
    python scripts/bench_rollout.py --weight full_sft --batch_sizes 64 256 --new_tokens 512 --json out/bench_rollout.json

Both give what reinforcement learning needs: sampled ids, and the log-probability of each. Answers come in groups of --generations
to one prompt, --batches times as many as are written side by side. Their lengths are forced on both sides:

    equal    --new_tokens each
    ragged   log-normal between 8 and --new_tokens; in `generate()` a row that is done goes on as padding until the longest of
             its batch ends, while the engine lets the next answer in

A round is what a step of training waits for: weights taken over, prompts, answers. Both sides take turns, and the medians over
the rounds are compared. Prompts have half of --prompt_len to all of it, random tokens, padded on the left for `generate()`.
"""

import math
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
from transformers import AutoModelForCausalLM, StoppingCriteria

from model.model_minimind import PRESETS
from model.sampling import SamplingParams
from trainer.arguments import TrainArgs, arg, check_positive, command, parse_args
from trainer.costs import wait_for
from trainer.metrics import write_json
from trainer.rollout import Rollout
from trainer.run import choose_device, choose_dtype
from trainer.weights import load_model

SHORTEST, SPREAD = 8, 0.7  # tokens of the shortest ragged answer; standard deviation of the lengths' logarithms


@dataclass
class BenchArgs:
    preset: str = arg("minimind2-small", "shape of the network (random weights)", choices=list(PRESETS))
    weight: str = arg("", "measure this network instead: a run in out/, or a checkpoint folder")
    batch_sizes: list[int] = arg([8, 32], "answers written side by side", nargs="+")
    batches: int = arg(2, "answers of a round, in batches")
    generations: int = arg(8, "answers to each prompt")
    prompt_len: int = arg(128, "tokens of the longest prompt")
    new_tokens: int = arg(128, "tokens of the longest answer")
    temperature: float = arg(1.0, "of sampling")
    rounds: int = arg(3, "times that both sides are measured, in turns")
    device: str = arg("auto", "cpu, cuda, cuda:1, ...; auto: the GPU if there is one")
    dtype: str = arg("auto", "auto: bfloat16 on a GPU that has it, else float32",
                     choices=["auto", "float32", "bfloat16", "float16"])
    json: str = arg("", "write the figures to this file too")

    def check(self):
        """ValueError for values out of range, and for a shape beside a checkpoint."""
        check_positive(self, "batches", "generations", "prompt_len", "new_tokens", "temperature", "rounds")
        if min(self.batch_sizes) < 1:
            raise ValueError("--batch_sizes takes numbers above 0")
        if self.weight and "preset" in self.given:
            raise ValueError("--preset is for random weights, and --weight brings its own shape: leave one of them out")


def prompts_of(number, args, vocab_size):
    """`number` prompts, lists of random ids that are no added tokens: each --generations times, one after another."""
    random = np.random.default_rng(0)
    lengths = random.integers(math.ceil(args.prompt_len / 2), args.prompt_len + 1, -(-number // args.generations))
    prompts = [random.integers(32, vocab_size, n).tolist() for n in lengths]
    return [prompts[i // args.generations] for i in range(number)]


def lengths_of(kind, number, args):
    """How long each answer is, as a list; ragged ones have a third of --new_tokens as median."""
    if kind == "equal":
        return [args.new_tokens] * number
    drawn = np.random.default_rng(1).lognormal(math.log(args.new_tokens / 3), SPREAD, number)
    return drawn.round().astype(int).clip(min(SHORTEST, args.new_tokens), args.new_tokens).tolist()


class Lengths(StoppingCriteria):
    """Row i of `generate()` is done after lengths[i] tokens; `width`: columns of the padded prompts."""

    eos_token_id = None  # its presence tells generate() to write padding into rows that are done

    def __init__(self, lengths, width, device):
        self.ends = torch.tensor(lengths, device=device) + width

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids.shape[1] >= self.ends


def write_theirs(model, prompts, lengths, batch_size, temperature):
    """[(ids, log-probabilities)] of transformers' generate(), a batch after another."""
    answers = []
    for start in range(0, len(prompts), batch_size):
        part, asked = prompts[start : start + batch_size], lengths[start : start + batch_size]
        width = max(map(len, part))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in part], device=model.device)
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in part], device=model.device)
        out = model.generate(ids, attention_mask=mask, do_sample=True, temperature=temperature, top_k=0, top_p=1.0,
                             eos_token_id=None, pad_token_id=0, max_new_tokens=max(asked), output_scores=True,
                             return_dict_in_generate=True, stopping_criteria=[Lengths(asked, width, model.device)])
        ids = out.sequences[:, width:]
        log_probs = torch.stack([scores.float().log_softmax(-1).gather(1, ids[:, [i]])[:, 0]
                                 for i, scores in enumerate(out.scores)], dim=1)
        rows = zip(ids.tolist(), log_probs.tolist(), asked)
        answers += [(row[:n], row_log_probs[:n]) for row, row_log_probs, n in rows]
        assert ids.shape[1] == max(asked) and not any(ids[i, n:].any() for i, n in enumerate(asked))
    return answers


def write_ours(engine, prompts, lengths, temperature):
    """[(ids, log-probabilities)] of the engine, which takes the weights over anew and forgets what it has cached."""
    engine.refresh()
    params = [SamplingParams(temperature, max_tokens=n, seed=i, ignore_eos=True) for i, n in enumerate(lengths)]
    return [(request.sampled, request.log_probs) for request in engine.generate(prompts, params)]


def measure(kind, batch_size, theirs, engine, args):
    """The figures of one kind of lengths and one batch size, as a dict."""
    number = batch_size * args.batches
    prompts, lengths = prompts_of(number, args, theirs.config.vocab_size), lengths_of(kind, number, args)
    sides = {"theirs": lambda n: write_theirs(theirs, prompts, n, batch_size, args.temperature),
             "ours": lambda n: write_ours(engine, prompts, n, args.temperature)}
    seconds = {side: [] for side in sides}
    for _ in range(args.rounds):
        for side, write in sides.items():
            if not seconds[side]:
                write([2] * number)  # what only the first call pays for
            wait_for(engine.device)
            start = time.perf_counter()
            answers = write(lengths)
            wait_for(engine.device)
            seconds[side].append(time.perf_counter() - start)
            assert [(len(ids), len(log_probs)) for ids, log_probs in answers] == [(n, n) for n in lengths]
    took = {side: median(times) for side, times in seconds.items()}
    return {"lengths": kind, "batch_size": batch_size, "answers": number, "tokens": sum(lengths), "longest": max(lengths),
            "seconds": took, "tokens_per_second": {side: sum(lengths) / x for side, x in took.items()},
            "ratio": took["theirs"] / took["ours"]}


def main(argv=None):
    args = parse_args(BenchArgs, argv)
    device = choose_device(args.device)
    dtype = choose_dtype(args.dtype, device)
    torch.manual_seed(0)
    settings = TrainArgs(preset=args.preset, from_weight=args.weight or "none")
    settings.given = set()
    model, tokenizer = load_model(settings, device)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    print(f"{args.weight or args.preset} on {device.type}, {dtype}, {torch.get_num_threads()} threads; "
          f"prompts of {args.prompt_len} tokens at most, {args.generations} answers each, temperature {args.temperature}")
    print(f"{'lengths':8}{'side by side':>13}{'answers':>9}{'tokens':>9}{'transformers':>15}{'ours':>15}{'ratio':>8}")
    rows, run = [], SimpleNamespace(device=device, dtype=dtype)
    for kind in ("equal", "ragged"):
        for batch_size in args.batch_sizes:
            size = SimpleNamespace(rollout_batch_size=batch_size, max_seq_len=args.prompt_len + args.new_tokens,
                                   temperature=args.temperature)
            rows.append(measure(kind, batch_size, theirs, Rollout(model, tokenizer, run, size).engine, args))
            row = rows[-1]
            speeds = "".join(f"{row['tokens_per_second'][side]:9.0f} tok/s" for side in ("theirs", "ours"))
            print(f"{kind:8}{batch_size:13}{row['answers']:9}{row['tokens']:9}{speeds}{row['ratio']:7.2f}x", flush=True)
    if args.json:
        write_json(args.json, {"weight": args.weight or args.preset, "device": device.type, "dtype": str(dtype),
                               "threads": torch.get_num_threads(), "generations": args.generations, "rows": rows})


if __name__ == "__main__":
    command(main)

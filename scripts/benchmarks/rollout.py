"""Speed of rollouts: completion tokens per second of the engine, against transformers' generate()
with the same weights in the same run.

    python scripts/bench.py rollout                                               # minimind2-small
    python scripts/bench.py rollout --weight full_sft --batch_sizes 64 256 --new_tokens 512

Both give what reinforcement learning needs: sampled ids, and the log-probability of each. Every
prompt gets --generations completions, and a round has --batches full batches of them. Lengths are
forced on both sides:

    equal    --new_tokens each
    ragged   log-normal between 8 and --new_tokens; in generate() a row that is done is padded until
             the longest of its batch ends, while the engine lets the next completion in

A round is what a training step waits for: weights taken over, prompts, completions. The two take
turns, and the medians over the rounds are compared. Prompts have half of --prompt_len to all of it,
random tokens, padded on the left for generate().
"""

import math
import random
from dataclasses import dataclass
from functools import partial

from model.presets import PRESETS
from scripts.benchmarks.results import BenchArgs, Results
from scripts.checkpoint import ComputeArgs
from trainer.runtime.arguments import arg, check_positive, parse_args
from trainer.runtime.stage_args import TrainArgs

SHORTEST, SPREAD = 8, 0.7  # ragged: tokens, and standard deviation of the lengths' logarithms
COLUMNS = """lengths batch_size completions tokens tokens_per_s reference_tokens_per_s ratio
ratio_range"""


@dataclass
class Args(ComputeArgs, BenchArgs):
    preset: str = arg("minimind2-small", "shape (random weights)", choices=list(PRESETS))
    weight: str = arg("", "measure this network instead: a run in out/, or a checkpoint folder")
    batch_sizes: list[int] = arg([8, 32], "completions of a batch", nargs="+")
    batches: int = arg(2, "batches of a round")
    generations: int = arg(8, "completions of each prompt")
    prompt_len: int = arg(128, "tokens of the longest prompt")
    new_tokens: int = arg(128, "tokens of the longest completion")
    temperature: float = arg(1.0, "of sampling")
    rounds: int = arg(3, "times that both sides are measured, in turns")

    def check(self) -> None:
        names = "batches generations prompt_len new_tokens temperature rounds"
        check_positive(self, *names.split())
        if min(self.batch_sizes) < 1:
            raise ValueError("--batch_sizes takes numbers above 0")
        if self.weight and "preset" in self.given:
            raise ValueError("--weight brings its own shape, not --preset: leave one of them out")


def measure(args: Args, results: Results) -> None:
    """A row per kind of lengths and batch size."""
    import torch

    from model.engine import Engine
    from scripts.benchmarks.steps import reference_of
    from scripts.benchmarks.timing import open_device
    from trainer.runtime.weights import load_network

    device, dtype = open_device(args, results)
    torch.manual_seed(0)
    flags = ["--from_weight", args.weight] if args.weight else ["--preset", args.preset]
    model, tokenizer = load_network(parse_args(TrainArgs, flags), device)
    reference, max_len = reference_of(model, dtype).eval(), args.prompt_len + args.new_tokens
    # as trainer/rl/rollout.py makes its engine
    shared = {"max_len": max_len, "prefill_chunk": max_len}
    shared["dtype"] = None if device.type == "cpu" else dtype
    for kind in ("equal", "ragged"):
        for batch_size in args.batch_sizes:
            engine = Engine(model, tokenizer, max_batch_size=batch_size, **shared)
            results.add(_measure_batches(kind, reference, engine, args))


def _measure_batches(kind, reference, engine, args):
    """Sample with both sides in turns; returns a row."""
    from scripts.benchmarks.generation import sample_engine, sample_reference
    from scripts.benchmarks.timing import speeds, take_turns, timed

    batch_size, temperature = len(engine.slots), args.temperature
    number = batch_size * args.batches
    prompts = draw_prompts(number, args, reference.config.vocab_size)
    lengths = draw_lengths(kind, number, args)

    def sample(side, lengths):
        if side == "ours":
            return sample_engine(engine, prompts, lengths, temperature)
        return sample_reference(reference, prompts, lengths, batch_size, temperature)

    def measure_side(side, _):
        seconds, completions = timed(lambda: sample(side, lengths), engine.device)
        assert [(len(ids), len(x)) for ids, x in completions] == [(n, n) for n in lengths]
        return seconds

    sides = {side: partial(measure_side, side) for side in ("reference", "ours")}
    for side in sides:
        sample(side, [2] * number)  # what only the first call pays for
    seconds = take_turns(sides, args.rounds)
    return {
        "lengths": kind,
        "batch_size": batch_size,
        "completions": number,
        "tokens": sum(lengths),
        "longest": max(lengths),
        **speeds("tokens", sum(lengths), seconds),
    }


def draw_prompts(number: int, args: Args, vocab_size: int) -> list[list[int]]:
    """`number` random prompts: each --generations times, one after another."""
    from scripts.benchmarks.generation import random_prompts

    draw, shortest = random.Random(0), math.ceil(args.prompt_len / 2)
    groups = -(-number // args.generations)
    lengths = [draw.randint(shortest, args.prompt_len) for _ in range(groups)]
    prompts = random_prompts(lengths, vocab_size)
    return [prompts[i // args.generations] for i in range(number)]


def draw_lengths(kind: str, number: int, args: Args) -> list[int]:
    """Tokens of each completion; ragged ones have a third of --new_tokens as median."""
    if kind == "equal":
        return [args.new_tokens] * number
    draw, shortest = random.Random(1), min(SHORTEST, args.new_tokens)
    drawn = (draw.lognormvariate(math.log(args.new_tokens / 3), SPREAD) for _ in range(number))
    return [min(max(round(length), shortest), args.new_tokens) for length in drawn]

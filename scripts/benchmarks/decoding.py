"""Decoding speed: tokens per second of the engine, against transformers' generate() with the same
weights and prompts in the same run.

    python scripts/bench.py decoding                                              # minimind2-small
    python scripts/bench.py decoding --preset minimind-3 --batch_size 1 32 256 --context 128

Both continue the same random prompts greedily. Only the tokens after the first are timed, so
prompts count for neither side. The two take turns, and the medians over the rounds are compared.
`bandwidth ratio` is the bytes per second that the steps must read (weights, cached keys and values)
over those that a plain copy moves.
"""

from dataclasses import dataclass
from statistics import median

from model.presets import PRESETS
from scripts.benchmarks.results import BenchArgs, Results
from scripts.checkpoint import ComputeArgs
from trainer.runtime.arguments import arg, check_positive
from trainer.runtime.stage_args import TrainArgs

COLUMNS = """context batch_size engine tokens_per_s reference_tokens_per_s ratio ratio_range
bandwidth_ratio same_texts"""


@dataclass
class Args(ComputeArgs, BenchArgs):
    preset: str = arg("minimind2-small", "shape (random weights)", choices=list(PRESETS))
    batch_size: list[int] = arg([1, 8, 16, 32], "requests at once", nargs="+")
    context: list[int] = arg([128, 2048], "tokens of each prompt", nargs="+")
    new_tokens: int = arg(32, "tokens that are timed, after the first")
    rounds: int = arg(3, "times that both sides are measured, in turns")
    int8: bool = arg(True, "measure int8 weights too, on a CPU")
    cuda_graphs: bool = arg(False, "replay recorded steps, on a GPU")

    def check(self) -> None:
        check_positive(self, "new_tokens", "rounds")
        if min(*self.batch_size, *self.context, 1) < 1:
            raise ValueError("--batch_size and --context take numbers above 0")


def measure(args: Args, results: Results) -> None:
    """A row per context, batch size and kind of engine."""
    import torch

    from model.engine import Engine
    from scripts.benchmarks.steps import reference_of
    from scripts.benchmarks.timing import open_device
    from trainer.runtime.costs import copy_rate
    from trainer.runtime.weights import load_network

    device, dtype = open_device(args, results)
    torch.manual_seed(0)
    model, tokenizer = load_network(TrainArgs(preset=args.preset), device)
    reference, bandwidth = reference_of(model, dtype).eval(), copy_rate(device, seconds=1.0)
    results.note(f"{args.preset}; a copy moves {bandwidth / 1e9:.0f} GB/s", bandwidth=bandwidth)
    kinds = {"ours": {"cuda_graphs": args.cuda_graphs}}
    if args.int8 and device.type == "cpu":
        kinds["int8"] = {"int8": True}
    for context in args.context:
        for batch in args.batch_size:
            shared = {"max_batch_size": batch, "max_len": context + args.new_tokens + 2}
            shared |= {"dtype": dtype, "prefill_chunk": 1 << 30}
            engines = {k: Engine(model, tokenizer, **shared, **kinds[k]) for k in kinds}
            for row in _measure_batch(reference, engines, context, args, bandwidth):
                results.add(row)


def _measure_batch(reference, engines, context, args, bandwidth):
    """Time generate() and the engines in turns; yields a row for each engine."""
    from scripts.benchmarks.generation import random_prompts, time_engine, time_reference
    from scripts.benchmarks.timing import speeds, take_turns

    batch, cache = len(engines["ours"].slots), engines["ours"].cache
    prompts = random_prompts([context] * batch, reference.config.vocab_size)
    sides = {"reference": lambda _: time_reference(reference, prompts, args.new_tokens)}
    for kind, engine in engines.items():
        sides[kind] = lambda _, engine=engine: time_engine(engine, prompts, args.new_tokens)
    turns = take_turns(sides, args.rounds)
    seconds = {kind: [took for took, _ in turns[kind]] for kind in sides}
    texts = {kind: turns[kind][-1][1] for kind in sides}
    # all weights (the embedding matrix is the head's too), and the cached keys and values
    read = sum(x.nbytes for x in reference.parameters()) + cache.nbytes() * context / cache.max_len
    for kind in engines:
        pair = {"ours": seconds[kind], "reference": seconds["reference"]}
        took = median(seconds[kind])
        yield {
            "context": context,
            "batch_size": batch,
            "engine": kind,
            **speeds("tokens", batch, pair),
            # int8 weights are fewer bytes
            "bandwidth_ratio": read / took / bandwidth if kind == "ours" else None,
            "same_texts": sum(a == b for a, b in zip(texts[kind], texts["reference"])),
        }

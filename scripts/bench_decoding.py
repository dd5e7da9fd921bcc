"""Decoding speed beside transformers: tokens per second of the engine and of `generate()`, same weights and prompts, one run.

    python scripts/bench_decoding.py                                               # minimind2-small
    python scripts/bench_decoding.py --preset minimind-3 --batch_size 1 32 256 --context 128 --json out/bench_decoding.json

Both continue the same random prompts greedily; timed are the tokens after the first, so prompts count for neither side. Ours
and theirs take turns, and the medians over the rounds are compared. "of bandwidth": bytes of weights and of cached keys
and values that each step must read, as a share of what a plain copy on this device moves.
"""

import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, StoppingCriteria

from model.engine import Engine
from model.model_minimind import PRESETS, MiniMindConfig, MiniMindForCausalLM
from model.sampling import SamplingParams
from trainer.arguments import arg, check_positive, command, parse_args
from trainer.costs import wait_for
from trainer.metrics import write_json
from trainer.run import choose_device, choose_dtype


@dataclass
class BenchArgs:
    preset: str = arg("minimind2-small", "shape of the network (random weights)", choices=list(PRESETS))
    batch_size: list[int] = arg([1, 8, 16, 32], "requests at once", nargs="+")
    context: list[int] = arg([128, 2048], "tokens of each prompt", nargs="+")
    new_tokens: int = arg(32, "tokens that are timed, after the first")
    rounds: int = arg(3, "times that both sides are measured, in turns")
    int8: bool = arg(True, "measure int8 weights too, on a CPU")
    device: str = arg("auto", "cpu, cuda, cuda:1, ...; auto: the GPU if there is one")
    dtype: str = arg("auto", "auto: bfloat16 on a GPU that has it, else float32",
                     choices=["auto", "float32", "bfloat16", "float16"])
    cuda_graphs: bool = arg(False, "replay recorded steps, on a GPU")
    json: str = arg("", "write the figures to this file too")

    def check(self):
        """ValueError for values out of range."""
        check_positive(self, "new_tokens", "rounds")
        if min(*self.batch_size, *self.context, 1) < 1:
            raise ValueError("--batch_size and --context take numbers above 0")


def prompts_of(batch, context, vocab_size, seed=0):
    """Random token ids [batch, context] that are no added tokens."""
    return torch.randint(32, vocab_size, (batch, context), generator=torch.Generator().manual_seed(seed))


class Clock(StoppingCriteria):
    """Notes when each token of `generate()` was there, and stops nothing."""

    def __init__(self):
        self.times = []

    def __call__(self, input_ids, scores, **kwargs):
        wait_for(input_ids.device)
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def time_theirs(model, ids, new_tokens):
    """(seconds per step, token ids [B, new_tokens + 1]) of transformers' generate()."""
    clock = Clock()
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, eos_token_id=None, pad_token_id=0,
                         max_new_tokens=new_tokens + 1, stopping_criteria=[clock])
    return (clock.times[-1] - clock.times[0]) / new_tokens, out[:, ids.shape[1]:].tolist()


def time_ours(engine, ids, new_tokens):
    """(seconds per step, token ids) of the engine; its cache is forgotten first, so that prompts are computed each time."""
    engine.refresh()
    params = SamplingParams(temperature=0, max_tokens=new_tokens + 1, ignore_eos=True)
    requests = [engine.add(prompt, params) for prompt in ids.tolist()]
    engine.step()  # lets all of them in and writes the first token of each
    assert all(len(request.answer) == 1 for request in requests)
    wait_for(engine.device)
    start = time.perf_counter()
    while engine.num_unfinished:
        engine.step()
    wait_for(engine.device)
    return (time.perf_counter() - start) / new_tokens, [request.answer for request in requests]


def copy_bandwidth(device):
    """Bytes per second that a large copy reads and writes."""
    a = torch.empty(64 << 20, device=device)
    b, best = torch.empty_like(a), 0.0
    for _ in range(5):
        start = time.perf_counter()
        b.copy_(a)
        wait_for(device)
        best = max(best, 2 * a.nbytes / (time.perf_counter() - start))
    return best


def bytes_per_step(network, cache, batch, context):
    """Weights that every step reads, all of them, and the keys and values of `batch` contexts."""
    weights = sum(x.nbytes for x in network.parameters())  # the embedding matrix is the head's too
    return weights + cache.nbytes() * batch * context / (cache.keys.shape[1] * cache.max_len)


def measure(theirs, engines, ids, args, bandwidth):
    """The figures of one batch size and context, as a dict."""
    seconds, batch = {kind: [] for kind in ("theirs", *engines)}, len(ids)
    for _ in range(args.rounds):
        took, expected = time_theirs(theirs, ids, args.new_tokens)
        seconds["theirs"].append(took)
        for kind, engine in engines.items():
            took, tokens = time_ours(engine, ids, args.new_tokens)
            seconds[kind].append(took)
            if kind == "ours":
                same = sum(a == b for a, b in zip(tokens, expected))
    step = {kind: median(took) for kind, took in seconds.items()}
    read = bytes_per_step(theirs, engines["ours"].cache, batch, ids.shape[1])
    return {"batch_size": batch, "context": ids.shape[1], "ms_per_step": {kind: 1e3 * took for kind, took in step.items()},
            "tokens_per_second": {kind: batch / took for kind, took in step.items()},
            "ratio": {kind: step["theirs"] / step[kind] for kind in engines},
            "of_bandwidth": read / step["ours"] / bandwidth, "same_texts": same}


def main(argv=None):
    args = parse_args(BenchArgs, argv)
    device = choose_device(args.device)
    dtype = choose_dtype(args.dtype, device)
    config = MiniMindConfig.from_preset(args.preset)
    torch.manual_seed(0)
    model = MiniMindForCausalLM(config).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "model")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    bandwidth, rows = copy_bandwidth(device), []
    print(f"{args.preset} on {device.type} in {str(dtype).removeprefix('torch.')}, {torch.get_num_threads()} threads, "
          f"a copy moves {bandwidth / 1e9:.0f} GB/s")
    kinds = {"ours": {"cuda_graphs": args.cuda_graphs}} | ({"int8": {"int8": True}} if args.int8 and device.type == "cpu" else {})
    for context in args.context:
        for batch in args.batch_size:
            ids = prompts_of(batch, context, config.vocab_size).to(device)
            size = context + args.new_tokens + 2
            engines = {kind: Engine(model, tokenizer, batch, size, dtype, prefill_chunk=1 << 30, **options)
                       for kind, options in kinds.items()}
            rows.append(measure(theirs, engines, ids, args, bandwidth))
            row = rows[-1]
            speeds = "".join(f", {kind} {row['tokens_per_second'][kind]:.0f} ({row['ratio'][kind]:.2f}x)" for kind in engines)
            print(f"batch {batch}, context {context}: transformers {row['tokens_per_second']['theirs']:.0f} tokens/s{speeds}; "
                  f"{row['of_bandwidth']:.0%} of the bandwidth, {row['same_texts']} of {batch} texts the same", flush=True)
    if args.json:
        write_json(args.json, {"preset": args.preset, "device": device.type, "dtype": str(dtype), "bandwidth": bandwidth,
                               "threads": torch.get_num_threads(), "rows": rows})


if __name__ == "__main__":
    command(main)

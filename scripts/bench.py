"""Benchmarks: what MiniMind costs, against a named reference measured in the same run.

    python scripts/bench.py training --steps 6 --json out/bench_training.json
    python scripts/bench.py training --help                       # the flags of one benchmark

training    target tokens per second of a training step, against transformers
decoding    tokens per second of the engine, against transformers' generate()
serving     latency and throughput of the server for many clients at once
rollout     completion tokens per second in reinforcement learning, against generate()
saving      fraction of training time that checkpoints take
cleaning    planted duplicates that are found in a corpus, and megabytes per second
tokenizer   characters per token on held-out text, against other tokenizers
stages      time and memory of the later stages, against plain fine-tuning

Each prints one table, and writes all that it has measured with --json FILE.
"""

import argparse
import sys
from importlib import import_module
from multiprocessing import current_process
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.benchmarks.results import Results
from trainer.runtime.arguments import command, parse_args

NAMES = "training decoding serving rollout saving cleaning tokenizer stages".split()


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark that the first argument names, with the flags after it."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s benchmark [--flag value ...]",
    )
    parser.add_argument("benchmark", choices=NAMES)
    name = parser.parse_args(argv[:1]).benchmark
    module = import_module(f"scripts.benchmarks.{name}")
    args, results = parse_args(module.Args, argv[1:]), Results(module.COLUMNS)
    module.measure(args, results)
    if args.json:
        results.write(args.json, name, args)


def run_as(path: str) -> None:
    """Run the benchmark that the name of a script ends with, such as bench_training.py."""
    if current_process().name == "MainProcess":  # workers import the script too
        name = Path(path).stem.removeprefix("bench_")
        command(lambda: main([name, *sys.argv[1:]]))


if __name__ == "__main__":
    command(main)

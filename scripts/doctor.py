"""The machine's devices, arithmetic and memory, and an estimate of training for every preset.

    python scripts/doctor.py
    python scripts/doctor.py --tokens 1000000000 --json out/doctor.json
    python scripts/doctor.py --device cpu --seconds 30     # a longer measurement is a steadier one

The estimate is a model with four measured constants: the rate of a large matrix product, the rate
of a large copy, and, from real optimizer steps of the `tiny` preset at two sizes, the cost of
everything between the matrix products and the fixed cost of a step. A preset's time is then its
arithmetic (6 * active weights * tokens + attention) and its elementwise traffic at those rates,
with AdamW. The training time of the quick start on a CPU is measured with real steps of its own
plan. Other work on the machine makes both measurement and training slower.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from model.files import write_json
from scripts.checkpoint import DeviceArgs
from trainer.runtime.arguments import arg, check_positive, command, parse_args


@dataclass
class DoctorArgs(DeviceArgs):
    tokens: int = arg(100_000_000, "size of the pretraining corpus that is estimated, in tokens")
    sft_tokens: int = arg(50_000_000, "size of the fine-tuning corpus, in tokens")
    seconds: float = arg(10.0, "how long to measure, about")
    json: str = arg("", "write the results to this file too")

    def check(self) -> None:
        check_positive(self, "tokens", "sft_tokens", "seconds")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(DoctorArgs, argv)
    try:
        from scripts.diagnosis import estimates, machine
        from trainer.runtime.run import Run
        from trainer.runtime.stage_args import TrainArgs
    except ImportError as error:
        raise ImportError(
            f"{error}\nInstall the project's requirements into their own environment: bash "
            "scripts/quickstart.sh does it, or python -m pip install -r requirements.txt"
        ) from error

    run, problems = Run(TrainArgs(device=args.device)), []
    print("measuring ...", flush=True)
    facts = machine.examine(run, 0.08 * args.seconds, problems)
    machine.describe(facts, problems)
    budgets = {"pretrain": args.tokens, "sft": args.sft_tokens}
    results = estimates.estimate_all(facts, budgets, run, args.seconds)
    estimates.print_estimates(results, budgets)
    if args.json:
        write_json(args.json, {**facts, "problems": problems, **results})


if __name__ == "__main__":
    command(main)

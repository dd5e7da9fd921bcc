"""Training speed: useful tokens per second of our step, against transformers' own model of the same
shape in the same run.

    python scripts/bench.py training                              # tiny and minimind2-small, SFT
    python scripts/bench.py training --preset tiny --stage pretrain --steps 30 --json out/bench.json
    python scripts/bench.py training --preset minimind-3 --data_path chats.jsonl --batch_size 64

Ours is the step of trainer/train_pretrain.py and trainer/train_full_sft.py: packed batch rows,
documents that do not see each other, the head on target positions only. The reference is the
standard architecture that our checkpoint folder names (Qwen3, Llama, ...), on the same sequences,
padded to the longest one of a batch of --reference_batch. Both start from the same weights, update
once per step with the same AdamW and clipping, and divide the loss by the same number of targets:
the losses agree. (The loss that balances experts is left out on both sides: ours counts it by
document.) The two take turns in blocks of a few steps.

Only target tokens count as useful. `limit` is the most that leaving out the padding can give: the
positions that the reference computes per real token. `matrix ratio` is the arithmetic of a step, 6
per weight and position and 12 * layers * heads * head width per pair of positions in attention,
over the rate of one large matrix product. `ratio range`: smallest and largest ratio of a block.
"""

from dataclasses import dataclass
from functools import partial
from statistics import median

from model.presets import PRESETS
from scripts.benchmarks.results import BenchArgs, Results
from scripts.checkpoint import ComputeArgs
from trainer.runtime.arguments import arg, check_not_negative, check_positive
from trainer.runtime.stage_args import TrainArgs

BLOCK = 2  # steps of one side before it is the other's turn
COLUMNS = """preset stage reference targets_per_s reference_targets_per_s ratio ratio_range limit
ratio_of_limit matrix_gflops_per_s matrix_ratio reference_matrix_ratio"""


@dataclass
class Args(ComputeArgs, BenchArgs):
    preset: list[str] = arg(["tiny", "minimind2-small"], "shapes", choices=list(PRESETS), nargs="+")
    stage: str = arg("sft", "whose rows and loss mask", choices=["pretrain", "sft"])
    data_path: list[str] = arg([], "files of rows (default: the toy world's)", nargs="+")
    rows: int = arg(0, "use only the first so many sequences; 0: all")
    steps: int = arg(10, "measured steps of each side, after the warm-up")
    warmup: int = arg(2, "steps of each side before that, not counted")
    batch_size: int = arg(8, "batch rows of our micro-batch, which is also the step")
    max_seq_len: int = arg(512, "tokens of a batch row")
    reference_batch: int = arg(
        8,
        "sequences in a batch of the reference, with gradients added up over a step; 0: the whole "
        "step in one",
    )
    use_compile: bool = arg(False, "torch.compile both networks; give more --warmup")
    seed: int = arg(42, "decides the weights and the packing")

    def check(self) -> None:
        check_positive(self, "steps", "batch_size")
        check_not_negative(self, "rows", "warmup", "reference_batch")


def measure(args: Args, results: Results) -> None:
    """A row per preset."""
    from scripts.benchmarks.steps import open_dataset
    from scripts.benchmarks.timing import open_device

    open_device(args, results)
    dataset = open_dataset(args.stage, args.data_path, args.max_seq_len, args.rows)
    for preset in args.preset:
        results.add(_measure_preset(preset, args, dataset))
    results.note(
        "{sequences:,} sequences, {real_tokens:,} tokens, {targets:,} targets, {positions:,} "
        "positions packed and {reference_positions:,} padded".format(**results.rows[-1])
    )


def _measure_preset(preset, args, dataset):
    """Time both sides in turns; returns a row."""
    from scripts.benchmarks.steps import sequences_of
    from scripts.benchmarks.timing import speeds, take_turns, timed
    from trainer.runtime.costs import matrix_rate, training_flops

    sides = _start_sides(preset, args, dataset)
    run, batches = sides["ours"].run, sides["ours"].batches
    steps = range(args.warmup, args.warmup + args.steps)

    def block(side, number):
        part = steps[number * BLOCK : (number + 1) * BLOCK]
        return timed(lambda: [side.step(step) for step in part], run.device)

    for side in sides.values():
        for step in range(args.warmup):
            side.step(step)
    turns = {name: partial(block, side) for name, side in sides.items()}
    turns["rate"] = lambda number: matrix_rate(run.device, run.dtype)
    measured = take_turns(turns, -(-args.steps // BLOCK))

    rate = median(measured["rate"])
    seconds = {name: [took for took, _ in measured[name]] for name in sides}
    losses = {name: [loss for _, part in measured[name] for loss in part] for name in sides}
    work, matrix = {}, {}
    for name, side in sides.items():
        work[name] = [sum(column) for column in zip(*map(side.work, steps))]
        flops = training_flops(sides["ours"].model.config, *work[name])
        matrix[name] = flops / sum(seconds[name]) / rate
    packed = [i for step in steps for i in sequences_of(batches, step)]
    real_tokens, targets = int(sum(dataset.lengths[i] for i in packed)), work["ours"][1]
    row = {
        "preset": preset,
        "stage": args.stage,
        "reference": type(sides["reference"].model).__name__,
        "sequences": len(packed),
        "real_tokens": real_tokens,
        "targets": targets,
        "positions": work["ours"][0],
        "reference_positions": work["reference"][0],
        **speeds("targets", targets, seconds, average=sum),
        "limit": work["reference"][0] / real_tokens,
        "matrix_gflops_per_s": rate / 1e9,
        "matrix_ratio": matrix["ours"],
        "reference_matrix_ratio": matrix["reference"],
        "losses": losses["ours"],
        "reference_losses": losses["reference"],
    }
    return row | {"ratio_of_limit": row["ratio"] / row["limit"]}


def _start_sides(preset, args, dataset):
    """{"ours", "reference"} with the same weights; ValueError if the rows are too few."""
    from scripts.benchmarks.steps import Ours, Theirs

    names = ("device", "dtype", "use_compile", "seed", "batch_size", "max_seq_len")
    settings = TrainArgs(preset=preset, **{name: getattr(args, name) for name in names})
    ours = Ours.start(settings, dataset)
    if len(ours.batches) < args.warmup + args.steps:
        raise ValueError(
            f"the rows fill {len(ours.batches)} steps: give more of them, or make --warmup "
            f"{args.warmup} plus --steps {args.steps} or --batch_size {args.batch_size} smaller"
        )
    ours.model.config.router_aux_loss_coef = 0.0  # the reference is loaded with it
    reference = Theirs(ours.model, ours.run, ours.batches, args.reference_batch)
    return {"ours": ours, "reference": reference}

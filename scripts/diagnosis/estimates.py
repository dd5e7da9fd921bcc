"""Memory and time of training, for every preset, from rates that are measured here."""

from statistics import median
from typing import Any

import torch

from dataset.toy_world import write_world
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.presets import PRESETS
from scripts import quickstart
from scripts.benchmarks import steps
from scripts.benchmarks.timing import timed
from trainer.runtime import costs
from trainer.runtime.arguments import ROOT, parse_args
from trainer.runtime.costs import Rates
from trainer.runtime.memory import StepSettings, memory_bytes
from trainer.runtime.process import Compute
from trainer.runtime.stage_args import TrainArgs
from trainer.train_full_sft import SFTArgs
from trainer.train_pretrain import PretrainArgs

GIB = 2**30
# of the micro-batch that is estimated: the defaults of --batch_size and --max_seq_len
ROWS, LENGTH = 8, 512
TARGET_RATIO = {"pretrain": 1.0, "sft": 0.6}  # of the tokens; chats are mostly answers


def measure_steps(settings: TrainArgs, dataset: Any, seconds: float) -> tuple[float, list, int]:
    """(median seconds of a real step, its mean positions, targets and pairs, number of steps)."""
    ours = steps.Ours.start(settings, dataset)
    ours.step(0)
    times, work = [], []
    while len(times) < 3 or (sum(times) < seconds and len(times) + 1 < len(ours.batches)):
        step = len(times) + 1
        times.append(timed(lambda step=step: ours.step(step), ours.run.device)[0])
        work.append(ours.work(step))
    return median(times), [sum(column) / len(work) for column in zip(*work)], len(ours.batches)


def calibrate(dataset: Any, device: torch.device, rates: dict[str, float], seconds: float) -> Rates:
    """Rates from steps of `tiny` on ROWS batch rows and on one: more work, the same cost a step."""
    config, params = shape("tiny")
    large, work, _ = measure_steps(tiny_settings(device, ROWS), dataset, seconds / 2)
    small, one, _ = measure_steps(tiny_settings(device, 1), dataset, seconds / 2)
    more_bytes = costs.elementwise_bytes(config, *work[:2])
    more_bytes -= costs.elementwise_bytes(config, *one[:2])
    more_flops = costs.training_flops(config, *work) - costs.training_flops(config, *one)
    spent = large - small - more_flops / rates["matrix"]
    elementwise = more_bytes / max(spent, more_bytes / rates["copy"])  # never faster than a copy
    found = Rates(**rates, elementwise=elementwise)
    rest = small if device.type == "cuda" else small - found.seconds(config, params, device, *one)
    found.step_per_layer = max(0.0, rest) / config.num_hidden_layers
    return found


def tiny_settings(device: torch.device, batch_size: int) -> TrainArgs:
    """The settings of a run of the `tiny` preset."""
    return TrainArgs(preset="tiny", device=str(device), batch_size=batch_size, max_seq_len=LENGTH)


def shape(preset: str) -> tuple[MiniMindConfig, int]:
    """(configuration, number of parameters) of a preset, without making its weights."""
    config = MiniMindConfig.from_preset(preset)
    with torch.device("meta"):
        return config, MiniMindForCausalLM(config).num_parameters()


def estimate(
    preset: str, rates: Rates, budgets: dict[str, int], run: Compute, free: float | None
) -> dict[str, Any]:
    """A row of the table, with hours for each stage's tokens; free: memory in bytes, or None."""
    (config, params), positions = shape(preset), ROWS * LENGTH
    memory = memory_bytes(config, params, positions, StepSettings(run.dtype))
    fits = None if free is None else memory < 0.9 * free
    row = {"preset": preset, "parameters": params, "memory_gib": memory / GIB, "fits": fits}
    pairs = positions * LENGTH / 2  # documents that fill a row: the most that attention can cost
    for stage, tokens in budgets.items():
        targets = TARGET_RATIO[stage] * positions
        step = rates.seconds(config, params, run.device, positions, targets, pairs)
        row |= {
            f"{stage}_tokens_per_s": positions / step,
            f"{stage}_hours": tokens / positions * step / 3600,
        }
    return row


def quick_start(seconds: float) -> dict[str, float]:
    """{stage: seconds} of scripts/quickstart.py on a CPU: a real step times the number of steps."""
    plan, found = quickstart.CPU, {}
    folder = ROOT / "dataset" / f"toy_{plan['level']}"
    write_world(plan["level"], folder)
    for stage, kind in (("pretrain", PretrainArgs), ("sft", SFTArgs)):
        flags = ["--preset", plan["preset"], "--device", "cpu", "--from_weight", "none"]
        settings = parse_args(kind, [*flags, *plan[stage]])
        path = str(folder / f"{stage}_train.jsonl")
        dataset = steps.open_dataset(stage, [path], settings.max_seq_len)
        step, _, count = measure_steps(settings, dataset, seconds / 2)
        found[stage] = step * count
    return found


def estimate_all(
    facts: dict[str, Any], budgets: dict[str, int], run: Compute, seconds: float
) -> dict[str, Any]:
    """{"rates", "quick_start_seconds", "presets"}; facts: those of `machine.examine`."""
    dataset = steps.open_dataset("pretrain", [], LENGTH)
    measured = {
        "matrix": facts["flops_per_s"][facts["dtype"]],
        "copy": costs.copy_rate(run.device, 0.05 * seconds),
    }
    rates = calibrate(dataset, run.device, measured, 0.4 * seconds)
    gib = facts["free_memory_gib"]
    free = None if gib is None else gib * GIB
    return {
        "rates": vars(rates),
        "quick_start_seconds": quick_start(0.2 * seconds) if run.device.type == "cpu" else {},
        "presets": [estimate(name, rates, budgets, run, free) for name in PRESETS],
    }


def duration(hours: float) -> str:
    """Hours in the unit that a person would use."""
    if hours * 60 < 90:
        return f"{hours * 60:,.1f} min" if hours * 60 < 10 else f"{hours * 60:,.0f} min"
    return f"{hours:,.1f} h" if hours < 48 else f"{hours / 24:,.0f} days"


def print_estimates(results: dict[str, Any], budgets: dict[str, int]) -> None:
    """Print the table of the presets."""
    pretrain, sft = (f"{budgets[stage] / 1e6:,.0f}M tokens" for stage in ("pretrain", "sft"))
    titles = ("preset", "parameters", "memory", "fits", f"pretrain {pretrain}", f"SFT {sft}")
    columns = "{:<16} {:>10} {:>9} {:>5} {:>26} {:>26}"
    print("", columns.format(*titles), sep="\n")
    for row in results["presets"]:
        stages = [
            f"{duration(row[f'{stage}_hours'])} ({row[f'{stage}_tokens_per_s']:,.0f}/s)"
            for stage in ("pretrain", "sft")
        ]
        fits = {True: "yes", False: "no", None: "?"}[row["fits"]]
        parameters, memory = f"{row['parameters'] / 1e6:.1f}M", f"{row['memory_gib']:.1f} GiB"
        print(columns.format(row["preset"], parameters, memory, fits, *stages))
    print(
        f"\nOne micro-batch of {ROWS} batch rows of {LENGTH} tokens a step, AdamW; tokens/s count "
        "every token."
    )
    if toy := results["quick_start_seconds"]:
        pretrain, sft = (duration(toy[stage] / 3600) for stage in ("pretrain", "sft"))
        print(
            f"The quick start on this CPU trains for {pretrain} (pretraining) and {sft} "
            "(fine-tuning)."
        )
    if any(row["fits"] is False for row in results["presets"]):
        print(
            "Presets that do not fit may with a smaller --batch_size: all but 16 bytes a parameter "
            "shrinks with it."
        )

"""Fair timing: the sides take turns, so that a machine that slows down slows all of them."""

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch

from scripts.benchmarks.results import Results
from scripts.checkpoint import DeviceArgs
from trainer.runtime.costs import wait_for
from trainer.runtime.process import choose_device, choose_dtype

Average = Callable[[Sequence[float]], float]


def open_device(args: DeviceArgs, results: Results) -> tuple[torch.device, torch.dtype]:
    """What --device and --dtype say; noted in the results."""
    device = choose_device(args.device)
    dtype = choose_dtype(getattr(args, "dtype", "auto"), device)
    facts = {
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }
    results.note("{device} in {dtype}, {threads} threads".format(**facts), **facts)
    return device, dtype


def timed(work: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """(seconds until the device has finished, result) of a call."""
    wait_for(device)
    start = time.perf_counter()
    result = work()
    wait_for(device)
    return time.perf_counter() - start, result


def take_turns(sides: dict[str, Callable[[int], Any]], rounds: int) -> dict[str, list[Any]]:
    """Call every side with the number of each round; returns the results per side."""
    results = {side: [] for side in sides}
    for number in range(rounds):
        for side, measure in sides.items():
            results[side].append(measure(number))
    return results


def compare(
    over: Sequence[float], under: Sequence[float], average: Average = median
) -> dict[str, Any]:
    """{"ratio": of the averages, "ratio_range": [smallest, largest] ratio of a round}."""
    pairs = [a / b for a, b in zip(over, under, strict=True)]
    return {"ratio": average(over) / average(under), "ratio_range": [min(pairs), max(pairs)]}


def speeds(
    unit: str, amount: float, seconds: dict[str, Sequence[float]], average: Average = median
) -> dict[str, Any]:
    """Units per second of "ours" and "reference", by their seconds in each round, and the ratio."""
    per_second = {side: amount / average(took) for side, took in seconds.items()}
    return {
        f"{unit}_per_s": per_second["ours"],
        f"reference_{unit}_per_s": per_second["reference"],
        **compare(seconds["reference"], seconds["ours"], average),
    }

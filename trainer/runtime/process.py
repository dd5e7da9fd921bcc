"""The process of a run: its device, its arithmetic, its random numbers and its signals."""

import ctypes
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from types import FrameType
from typing import Any

import numpy as np
import torch

from trainer.runtime.ranks import Ranks

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
GRACE_SECONDS = 2  # torchrun passes Ctrl-C on to processes that have it from the terminal already


class Compute:
    """Where and in which arithmetic a network runs: `device`, `dtype`, and the `ranks`."""

    def __init__(self, args: Any):
        self.ranks = Ranks()
        self.device = choose_device(args.device, self.ranks)
        self.dtype = choose_dtype(args.dtype, self.device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")
        else:
            keep_freed_memory()

    def autocast(self) -> AbstractContextManager:
        """The context of every forward: float32 parameters, matrix products in `dtype`."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def to_device(self, micro_batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Move a micro-batch's tensors to the device."""
        return {name: x.to(self.device, non_blocking=True) for name, x in micro_batch.items()}

    def sum(self, number: float | torch.Tensor) -> float:
        """The sum of a number over all ranks."""
        return self.ranks.sum(number)


class StopSignals:
    """Ctrl-C, SIGTERM and SIGHUP end a run after the current step, with a checkpoint; a second
    Ctrl-C ends it at once. Catches them inside a `with`; `received` is the first of them, or None.

    SIGHUP says that the terminal was closed. nohup has it ignored, and so it stays.
    """

    def __init__(self) -> None:
        self.received, self.since, self.before = None, 0.0, {}

    def __enter__(self) -> "StopSignals":
        try:
            for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", None)):
                if number and signal.getsignal(number) != signal.SIG_IGN:
                    self.before[number] = signal.signal(number, self.note)
        except ValueError:
            pass  # not in the main thread: the caller looks after signals
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}

    def note(self, number: int, frame: FrameType | None) -> None:
        """Remember the first signal; a second Ctrl-C is KeyboardInterrupt."""
        repeated = self.received is not None and number == signal.SIGINT
        is_recent = time.monotonic() - self.since < GRACE_SECONDS
        if repeated and not ("TORCHELASTIC_RUN_ID" in os.environ and is_recent):
            raise KeyboardInterrupt
        if self.received is None:
            self.received, self.since = number, time.monotonic()
            if os.environ.get("RANK", "0") == "0":
                text = b"\nstopping after this step; Ctrl-C again stops at once, without saving\n"
                with suppress(OSError):  # the terminal may be gone
                    os.write(2, text)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an exception says that the device's, or the machine's, memory is full."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def keep_freed_memory() -> None:
    """Tell glibc to keep large freed tensors: else each step pays for their page faults again."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):  # other C libraries lack it
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def choose_device(name: str, ranks: Ranks | None = None) -> torch.device:
    """torch.device for a --device; with several ranks each takes the GPU of its number.

    ValueError if it is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not name.startswith("cuda"):
        try:
            return torch.device(name)
        except RuntimeError as error:
            raise ValueError(f"--device {name}: give cpu, cuda, cuda:1, ... or auto") from error
    if not torch.cuda.is_available():
        raise ValueError(
            f"--device {name}: PyTorch sees no CUDA GPU here; use --device cpu, or install a CUDA "
            "build"
        )
    if ranks and ranks.world_size > 1:
        if name != "cuda":
            raise ValueError(
                f"--device {name} with {ranks.world_size} ranks: each takes the GPU of its own "
                "number; give --device cuda, and choose among them with CUDA_VISIBLE_DEVICES"
            )
        if ranks.local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"{ranks.local_world_size} ranks, but {torch.cuda.device_count()} GPUs on this "
                "machine: give a smaller --nproc_per_node"
            )
        name = f"cuda:{ranks.local_rank}"
    return torch.device(name)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """torch.dtype for a --dtype; auto: bfloat16 on GPUs that have it (Ampere on), else float32."""
    if name == "auto":
        is_cuda = device.type == "cuda"
        is_native = is_cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        name = "bfloat16" if is_native else "float32"
    return DTYPES[name]


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and PyTorch on all devices."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, and the former mode again afterwards."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)

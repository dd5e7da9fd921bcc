"""One training process, and one optimizer step: backward, clip, step."""

import inspect
import math
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from trainer.runtime.memory import StepMemory, StepSettings, memory_fix
from trainer.runtime.process import Compute, StopSignals, is_out_of_memory, seed_everything
from trainer.runtime.stage_args import TrainArgs, read_deepspeed_config


class Update(NamedTuple):
    """One optimizer step, applied if finite: loss over all ranks, gradient norm before the clip."""

    loss: float
    grad_norm: float
    is_finite: bool


class Inspected(Exception):
    """Ends a run that was only asked to show its data."""


class Run(Compute):
    """One training process. Use it in a `with`.

    args: the stage's flags. folder, resume_from, rows_per_step: set by `load_model`, which opens
    the run's folder. saved_step: updates in the newest checkpoint, kept by the loop. contexts: what
    must be closed at the end.
    """

    def __init__(self, args: TrainArgs):
        super().__init__(args)
        self.args, self.net, self.engine = args, None, None
        self.folder: Path | None = None
        self.resume_from: tuple[Path, dict] | None = None  # newest whole checkpoint, its progress
        self.rows_per_step = args.rows_per_step(self.ranks.world_size)
        self.saved_step: int | None = None
        self.step_memory: StepMemory | None = None
        # float16 has no range for small gradients: they are scaled up before backward and down
        # again before the step
        enabled = self.dtype == torch.float16
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=enabled)
        self.signals, self.contexts = StopSignals(), ExitStack()
        seed_everything(args.seed)  # the same on all ranks: they begin with the same weights
        if args.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)

    def __enter__(self) -> "Run":
        self.ranks.start(self.device, also_alone=bool(self.args.deepspeed))
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> bool:
        self.contexts.__exit__(kind, error, trace)
        # after an error the other ranks may wait in a collective: the launcher ends them
        if error is None or kind is Inspected:
            self.ranks.close()
        if is_out_of_memory(error):
            saved = f" Step {self.saved_step} is saved." if self.saved_step else ""
            raise MemoryError(
                f"out of memory on {self.device}: {str(error).splitlines()[0]}{saved} Fix: "
                f"{self.fix_for_memory()}"
            ) from error
        return kind is Inspected

    def __str__(self) -> str:
        ranks = f"{self.ranks.world_size} ranks of " if self.ranks.world_size > 1 else ""
        return f"{ranks}{self.device.type} in {str(self.dtype).removeprefix('torch.')}"

    def print0(self, *text: object) -> None:
        """Print on rank 0 alone."""
        if self.ranks.is_main_process:
            print(*text, flush=True)

    def seed(self, step: int) -> None:
        """Seed all generators for a step, so that a resumed run draws the same numbers."""
        sequence = np.random.SeedSequence([self.args.seed, step, self.ranks.rank])
        seed_everything(sequence.generate_state(1)[0].item())

    def count_targets(self, micro_batches: list[dict[str, torch.Tensor]]) -> float:
        """The tokens that a step is trained on, over all ranks: the labels that are not -100.

        No document's first label counts: `collate` makes it -100, since nothing predicts it.
        """
        return self.sum(sum((micro["labels"] != -100).sum() for micro in micro_batches))

    def estimate_memory(self, model: torch.nn.Module) -> StepMemory:
        """The memory of a step of this run, kept for the message if it runs out."""
        zero = {}
        if self.args.deepspeed:
            zero = read_deepspeed_config(self.args.deepspeed)["zero_optimization"]
        settings = StepSettings(
            dtype=self.dtype,
            optimizer=self.args.optimizer,
            trained=sum(x.numel() for x in model.parameters() if x.requires_grad),
            zero_stage=zero.get("stage", 0),
            world_size=self.ranks.world_size,
            offload_optimizer="offload_optimizer" in zero,
        )
        self.step_memory = StepMemory(model, self.args, self.device, settings)
        return self.step_memory

    def fix_for_memory(self) -> str:
        """What to change after memory ran out: by the estimate, if there was one by then."""
        if self.step_memory is None:  # not even the weights fit
            return memory_fix(self.args, lambda *choice: 1, 0)
        return self.step_memory.fix(self.saved_step is not None)

    def wrap(self, model: torch.nn.Module, optimizer: Any = None) -> torch.nn.Module:
        """The module to call in the loop; `model` itself stays, for saving and validation."""
        if self.args.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        net = torch.compile(model) if self.args.use_compile else model
        if self.args.deepspeed:
            from trainer.runtime.deepspeed_engine import DeepSpeedEngine

            self.engine = DeepSpeedEngine(net, model, optimizer, self.args, self.dtype)
            net = self.engine.wrapped
        elif self.ranks.world_size > 1:
            # each rank has its own expert counters; torch 2.11 called the flag broadcast_buffers
            known = inspect.signature(DistributedDataParallel).parameters
            flag = (
                "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
            )
            devices = [self.device.index] if self.device.type == "cuda" else None
            net = DistributedDataParallel(
                net, device_ids=devices, gradient_as_bucket_view=True, **{flag: False}
            )
        self.net = net
        return net

    @contextmanager
    def micro_step(self, is_last: bool) -> Iterator[None]:
        """Around forward and backward of a micro-batch: autocast; the last exchanges gradients."""
        is_ddp = isinstance(self.net, DistributedDataParallel)
        if self.engine:
            self.engine.wrapped.set_gradient_accumulation_boundary(is_last)
        with self.net.no_sync() if is_ddp and not is_last else nullcontext(), self.autocast():
            yield

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of this rank's part of the step's loss; the ranks' parts add up."""
        if self.ranks.world_size > 1:
            # the exchange averages over the ranks; each loss is divided by the count of all ranks
            loss = loss * self.ranks.world_size
        with torch.autocast(self.device.type, enabled=False):
            if self.engine:
                self.engine.wrapped.backward(loss, scale_wrt_gas=False)
            else:
                self.scaler.scale(loss).backward()

    def clip_and_step(self, model: torch.nn.Module, optimizer: Any, loss: float) -> Update:
        """Unscale and clip the gradients, step, forget them.

        loss: of the whole step, over all ranks. If it or the norm is not finite, the step is left
        out.
        """
        if self.engine:
            norm = self.engine.clip_and_step()  # leaves out a step whose norm is not finite
            return Update(loss, norm, math.isfinite(loss) and math.isfinite(norm))
        optimizers = getattr(optimizer, "parts", [optimizer])
        for one in optimizers:
            self.scaler.unscale_(one)
        grads = [x.grad for x in model.parameters() if x.grad is not None]
        total = torch.nn.utils.get_total_norm(grads)
        norm = total.item()
        # an overflow in float16 is the scaler's business, as long as it can lower its scale
        is_overflow = self.scaler.is_enabled() and self.scaler.get_scale() > 1
        is_finite = math.isfinite(loss) and (math.isfinite(norm) or is_overflow)
        # the scaler looks at each optimizer's gradients alone: one overflow must stop them all
        if is_finite and math.isfinite(norm):
            if self.args.grad_clip:
                torch.nn.utils.clip_grads_with_norm_(model.parameters(), self.args.grad_clip, total)
            for one in optimizers:
                self.scaler.step(one)
        if self.scaler.is_enabled():
            self.scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return Update(loss, norm, is_finite)

    def stop_asked(self) -> bool:
        """Whether some rank was told, by Ctrl-C or SIGTERM, to stop after this step."""
        return self.ranks.any(self.signals.received)

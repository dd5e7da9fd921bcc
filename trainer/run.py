"""Where a run computes: devices, ranks, arithmetic, seeds, and one optimizer step in its right order."""

import ctypes
import inspect
import os
import random
import signal
import sys
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from trainer.costs import memory_advice, step_needs, way_out, way_out_of_failure
from trainer.distributed import Ranks
from trainer.guard import NonFiniteGuard
from trainer.sharding import Sharded, read_config
from trainer.stop_signals import StopSignals

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Compute:
    """Where and in which arithmetic a network runs: `device`, `dtype`, and the `ranks` that share the work."""

    def __init__(self, args):
        self.ranks = Ranks()
        self.device = choose_device(args.device, self.ranks)
        self.dtype = choose_dtype(args.dtype, self.device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")
        else:
            keep_freed_memory()

    def autocast(self):
        """The context of every forward: parameters stay float32, matrix products run in `dtype`."""
        return nullcontext() if self.dtype == torch.float32 else torch.autocast(self.device.type, self.dtype)

    def to_device(self, micro_batch):
        """Move a micro-batch's tensors to the device."""
        return {name: x.to(self.device, non_blocking=True) for name, x in micro_batch.items()}

    def sum(self, number):
        """The sum of a number over all ranks (float)."""
        return self.ranks.sum(number)


class Run(Compute):
    """One training process: its scaler, its part of the gradients' exchange, its end. Use it in a `with`."""

    def __init__(self, args):
        super().__init__(args)
        self.args, self.engine, self.net = args, None, None
        self.estimate = None  # (what a step needs under which choices, what there is for it): see memory_advice
        self.saved = None  # updates done in the newest checkpoint of this run, if there is one
        # float16 has no range for small gradients: they are scaled up before backward and down again before the step
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.guard = NonFiniteGuard(args.max_bad_steps)
        self.signals = StopSignals()
        seed_everything(args.seed)  # the same on all ranks: they begin with the same weights
        if args.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)

    def __enter__(self):
        self.ranks.start(self.device, also_alone=bool(self.args.deepspeed))
        return self

    def __exit__(self, kind, error, trace):
        if error is None:
            self.ranks.close()  # after an error the others may wait in the middle of something: the launcher ends them
        if is_out_of_memory(error):
            saved = f" Step {self.saved} is saved." if self.saved else ""
            raise MemoryError(f"out of memory on {self.device}: {str(error).splitlines()[0]}{saved} Way out: "
                              f"{self.way_out_of_memory()}") from error

    def __str__(self):
        ranks = f"{self.ranks.world_size} ranks of " if self.ranks.world_size > 1 else ""
        return f"{ranks}{self.device.type} in {str(self.dtype).removeprefix('torch.')}"

    def say(self, *text):
        """Print on rank 0 alone."""
        if self.ranks.is_first:
            print(*text, flush=True)

    def seed(self, step):
        """Seed all generators for a step, so that a resumed run draws what an uninterrupted one draws."""
        seed_everything(np.random.SeedSequence([self.args.seed, step, self.ranks.rank]).generate_state(1)[0].item())

    def memory_advice(self, model):
        """What a step will need of the device's memory, and what to change if that is not there: a sentence."""
        zero = read_config(self.args)["zero_optimization"] if self.args.deepspeed else {}
        sharing = {"zero_stage": zero.get("stage", 0), "world_size": self.ranks.world_size,
                   "offload_optimizer": "offload_optimizer" in zero,
                   "trained": sum(x.numel() for x in model.parameters() if x.requires_grad)}
        _, room, advice = memory_advice(model.config, model, self.args, self.device, self.dtype, **sharing)
        self.estimate = step_needs(model.config, model.num_parameters(), self.args, self.dtype, **sharing), room
        return advice

    def way_out_of_memory(self):
        """What to change after memory ran out: by the estimate, if it was made before that."""
        if self.estimate is None:  # not even the weights are there
            return way_out(self.args, lambda *choice: 1, 0)
        return way_out_of_failure(self.args, *self.estimate, self.saved is not None)

    def wrap(self, model, optimizer=None):
        """The module to call in the loop; `model` itself stays the raw one, for saving and validation."""
        if self.args.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        net = torch.compile(model) if self.args.use_compile else model
        if self.args.deepspeed:
            self.engine = Sharded(net, model, optimizer, self)
            net = self.engine.engine
        elif self.ranks.world_size > 1:
            # the experts' counters are each rank's own; what forbids to share them was renamed after torch 2.11
            known = inspect.signature(DistributedDataParallel).parameters
            own_buffers = {"forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False}
            devices = [self.device.index] if self.device.type == "cuda" else None
            net = DistributedDataParallel(net, device_ids=devices, gradient_as_bucket_view=True, **own_buffers)
        self.net = net
        return net

    @contextmanager
    def micro_step(self, is_last):
        """Around forward and backward of a micro-batch: autocast; the ranks exchange gradients in the step's last one."""
        is_ddp = isinstance(self.net, DistributedDataParallel)
        if self.engine:
            self.engine.engine.set_gradient_accumulation_boundary(is_last)
        with self.net.no_sync() if is_ddp and not is_last else nullcontext(), self.autocast():
            yield

    def backward(self, loss):
        """Add the gradients of this rank's part of the step's loss; the ranks' parts add up."""
        if self.ranks.world_size > 1:
            loss = loss * self.ranks.world_size  # gradients are averaged over the ranks, and ours are shares of a sum
        with torch.autocast(self.device.type, enabled=False):
            if self.engine:
                self.engine.engine.backward(loss, scale_wrt_gas=False)
            else:
                self.scaler.scale(loss).backward()

    def clip_and_step(self, model, optimizer, loss):
        """Unscale, clip, step, forget the gradients; returns their norm before clipping (float).

        `loss` is the step's, over all ranks. The step is left out if it or the norm is not finite: see `guard`.
        """
        if self.engine:
            return self.engine.clip_and_step(loss, self.guard)
        parts = getattr(optimizer, "parts", [optimizer])
        for part in parts:
            self.scaler.unscale_(part)
        norm = torch.nn.utils.get_total_norm([x.grad for x in model.parameters() if x.grad is not None])
        value = norm.item()
        # an overflow in float16 is the scaler's business, which lowers its scale, as long as there is room below
        is_overflow = self.scaler.is_enabled() and self.scaler.get_scale() > 1
        # each part has its own gradients looked at by the scaler: what has overflown in one must stop the others too
        if self.guard.check(loss, value, is_overflow) and norm.isfinite():
            if self.args.grad_clip:
                torch.nn.utils.clip_grads_with_norm_(model.parameters(), self.args.grad_clip, norm)
            for part in parts:
                self.scaler.step(part)
        if self.scaler.is_enabled():
            self.scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return value

    def stop_asked(self):
        """Whether some rank was told, by Ctrl-C or SIGTERM, to stop after this step."""
        return self.ranks.any(self.signals.received)

    def end_if_stopped(self, stopped, folder, step):
        """End the program as the signal wants it, once everything is saved; nothing if there was none."""
        if not stopped:
            return
        if self.saved == step:
            self.say(f"stopped after step {step}, which is saved in {folder}: go on with the same command and --from_resume")
        else:
            self.say(f"stopped after step {step}, the last {self.guard.in_a_row} of them not finite: not saved. "
                     + (f"Step {self.saved} is, in {folder}: go on from there with the same command and --from_resume"
                        if self.saved else f"There is no checkpoint yet; their rows are in {folder / 'bad_steps'}"))
        sys.exit(128 + (self.signals.received or signal.SIGTERM))


def is_out_of_memory(error):
    """Whether an exception says that the device's, or the machine's, memory is full."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error))


def keep_freed_memory():
    """Tell glibc to keep large freed tensors: given back to the system, each step pays for their page faults again."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):  # other C libraries lack it
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def choose_device(name, ranks=None):
    """torch.device for a --device; with several ranks each takes the GPU of its number. ValueError if it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: PyTorch sees no CUDA GPU here; use --device cpu, or install a CUDA build")
    if name.startswith("cuda") and ranks and ranks.world_size > 1:
        if name != "cuda":
            raise ValueError(f"--device {name} with {ranks.world_size} ranks: each takes the GPU of its own number; "
                             "give --device cuda, and choose among them with CUDA_VISIBLE_DEVICES")
        if ranks.local_rank >= torch.cuda.device_count():
            raise ValueError(f"{ranks.local_world_size} ranks, but {torch.cuda.device_count()} GPUs on this machine: "
                             "give a smaller --nproc_per_node")
        name = f"cuda:{ranks.local_rank}"
    return torch.device(name)


def choose_dtype(name, device):
    """torch.dtype for a --dtype; auto is bfloat16 on GPUs that have it (Ampere on), else float32."""
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return DTYPES[name]


def seed_everything(seed):
    """Seed Python, NumPy and PyTorch on all devices."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def evaluating(model):
    """Evaluation mode without gradients, and the former mode again afterwards."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)

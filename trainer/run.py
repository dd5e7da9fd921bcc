"""Where a run computes: device, arithmetic, seeds, and one optimizer step in its right order."""

import ctypes
import random
import sys
from contextlib import contextmanager, nullcontext

import numpy as np
import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Run:
    """Device, autocast and gradient scaler of one training process."""

    def __init__(self, args):
        self.device = choose_device(args.device)
        self.dtype = choose_dtype(args.dtype, self.device)
        self.grad_clip = args.grad_clip
        self.use_compile = args.use_compile
        # float16 has no range for small gradients: they are scaled up before backward and down again before the step
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        seed_everything(args.seed)
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")
        else:
            keep_freed_memory()

    def autocast(self):
        """The context of every forward: parameters stay float32, matrix products run in `dtype`."""
        return nullcontext() if self.dtype == torch.float32 else torch.autocast(self.device.type, self.dtype)

    def wrap(self, model):
        """The module to call in the loop; `model` itself stays the raw one, for saving."""
        return torch.compile(model) if self.use_compile else model

    def to_device(self, micro_batch):
        """Move a micro-batch's tensors to the device."""
        return {name: x.to(self.device, non_blocking=True) for name, x in micro_batch.items()}

    def backward(self, loss):
        self.scaler.scale(loss).backward()

    def clip_and_step(self, model, optimizer):
        """Unscale, clip, step, forget the gradients; returns their norm before clipping (float)."""
        parts = getattr(optimizer, "parts", [optimizer])
        for part in parts:
            self.scaler.unscale_(part)
        gradients = [x.grad for x in model.parameters() if x.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if norm.isfinite():
            if self.grad_clip:
                torch.nn.utils.clip_grads_with_norm_(model.parameters(), self.grad_clip, norm)
            for part in parts:
                self.scaler.step(part)
        elif not self.scaler.is_enabled():  # in float16 the step is left out, and the scale goes down
            raise FloatingPointError("the gradient is not finite: lower --learning_rate; the last checkpoint is from before")
        self.scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return norm.item()


def keep_freed_memory():
    """Tell glibc to keep large freed tensors: given back to the system, each step pays for their page faults again."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):  # other C libraries lack it
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def choose_device(name):
    """torch.device for a --device; ValueError if this machine lacks it."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: PyTorch sees no CUDA GPU here; use --device cpu, or install a CUDA build")
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

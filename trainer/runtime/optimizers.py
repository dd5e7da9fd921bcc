"""AdamW and Muon, and the schedule of the learning rate from the first step to the last.

An update of a matrix usually is dominated by a few directions. Muon (Jordan et al. 2024,
https://kellerjordan.github.io/posts/muon) makes all its singular values about 1, so that rare
directions learn as fast. Scaled by 0.2 * sqrt(longer side) it moves the weights as much as AdamW
does, so both take the same learning rate and decay (Liu et al. 2025, arXiv 2502.16982, eq. 4).
"""

import math
from typing import Any

import torch

from trainer.runtime.stage_args import TrainArgs

# Five steps of this quintic bring singular values from (0.01, 1] to about [0.7, 1.2] (Jordan 2024).
COEFFICIENTS, STEPS = (3.4445, -4.7750, 2.0315), 5


def build_optimizer(
    model: torch.nn.Module, args: TrainArgs
) -> "torch.optim.Optimizer | OptimizerGroup":
    """AdamW (Loshchilov & Hutter 2019) for all parameters, or Muon for the layers' matrices.

    AdamW has the rest then. Matrices decay, norm weights do not. AdamW is one kernel for all.
    """
    parameters = {name: x for name, x in model.named_parameters() if x.requires_grad}
    by_muon = {
        name
        for name, x in parameters.items()
        if args.optimizer == "muon" and x.dim() >= 2 and ".layers." in name
        if not name.endswith(".gate.weight")
    }
    rest = [x for name, x in parameters.items() if name not in by_muon]
    groups = [
        {"params": [x for x in rest if x.dim() >= 2], "weight_decay": args.weight_decay},
        {"params": [x for x in rest if x.dim() < 2], "weight_decay": 0.0},
    ]
    # adapters may have matrices alone; DeepSpeed wants no empty group
    groups = [group for group in groups if group["params"]]
    lr, optimizers = args.learning_rate, []
    if by_muon:
        optimizers.append(Muon([parameters[x] for x in sorted(by_muon)], lr, args.weight_decay))
    if groups:
        betas = (0.9, args.beta2)
        optimizers.append(torch.optim.AdamW(groups, lr=lr, betas=betas, eps=1e-8, fused=True))
    return optimizers[0] if len(optimizers) == 1 else OptimizerGroup(*optimizers)


def learning_rate_at(step: int, num_steps: int, args: TrainArgs) -> float:
    """Learning rate of `step` (from 0) out of `num_steps`: linear warm-up, then by --schedule.

    cosine: half a cosine from the peak to `min_lr_ratio` of it (Loshchilov & Hutter 2017, eq. 5).
    wsd: the peak, then a linear fall to `min_lr_ratio` over the last `decay_ratio` of the steps (Hu
    et al. 2024, section 4.2).
    """
    warmup = math.ceil(args.warmup_ratio * num_steps)
    if step < warmup:
        return args.learning_rate * (step + 1) / warmup
    if args.schedule == "cosine":
        progress = (step - warmup) / max(1, num_steps - 1 - warmup)
        height = 0.5 * (1 + math.cos(math.pi * progress))
    else:
        decay = math.ceil(args.decay_ratio * num_steps)
        height = min(1.0, (num_steps - 1 - step) / decay) if decay else 1.0
    return args.learning_rate * (args.min_lr_ratio + (1 - args.min_lr_ratio) * height)


def set_learning_rate(optimizer: Any, learning_rate: float) -> None:
    """Set the learning rate of all parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def orthogonalize(x: torch.Tensor) -> torch.Tensor:
    """The matrices of x [..., m, n] with all singular values near 1; float32 or bfloat16.

    By the Newton-Schulz iteration.
    """
    a, b, c = COEFFICIENTS
    transposed = x.shape[-2] > x.shape[-1]
    x = x.mT if transposed else x  # the products below are of the shorter side
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if transposed else x


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and decoupled decay, for matrices [m, n] or stacks [E, m, n]."""

    def __init__(
        self,
        parameters: list[torch.nn.Parameter],
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
    ):
        super().__init__(parameters, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self) -> None:
        """Update all parameters that have a gradient."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["momentum"] = torch.zeros_like(weight)
                momentum = state["momentum"].lerp_(weight.grad, 1 - group["momentum"])
                update = weight.grad.lerp(momentum, group["momentum"])
                update = orthogonalize(update.bfloat16() if update.is_cuda else update)
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                scale = -0.2 * max(weight.shape[-2:]) ** 0.5 * group["lr"]
                weight.add_(update.type_as(weight), alpha=scale)


class OptimizerGroup:
    """Several optimizers that step, save and load as one."""

    def __init__(self, *parts: torch.optim.Optimizer):
        self.parts = parts

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts for group in part.param_groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return {type(part).__name__: part.state_dict() for part in self.parts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for part in self.parts:
            part.load_state_dict(state[type(part).__name__])

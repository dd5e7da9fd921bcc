"""Muon: momentum whose direction is orthogonalised, for the weight matrices inside the layers.

An update of a matrix usually is dominated by a few directions. Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon)
makes all its singular values about 1, so that rare directions learn as fast. Scaled by 0.2 * sqrt(longer side) it moves
the weights as much as AdamW does, so both take the same learning rate and decay (Liu et al. 2025, arXiv 2502.16982, eq. 4).
"""

import torch

# Five steps of this quintic bring singular values from (0.01, 1] to about [0.7, 1.2] (Jordan et al. 2024).
COEFFICIENTS, STEPS = (3.4445, -4.7750, 2.0315), 5


def orthogonalize(x):
    """The matrices of x [..., m, n] with all singular values near 1, by the Newton-Schulz iteration; float32 or bfloat16."""
    a, b, c = COEFFICIENTS
    transposed = x.shape[-2] > x.shape[-1]
    x = x.mT if transposed else x  # the products below are of the shorter side
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if transposed else x


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and decoupled weight decay, for parameters [m, n] or stacks of them [E, m, n]."""

    def __init__(self, parameters, lr, weight_decay=0.0, momentum=0.95):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["momentum"] = torch.zeros_like(weight)
                momentum = state["momentum"].lerp_(weight.grad, 1 - group["momentum"])
                update = weight.grad.lerp(momentum, group["momentum"])
                update = orthogonalize(update.bfloat16() if update.is_cuda else update).type_as(weight)
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(update, alpha=-0.2 * max(weight.shape[-2:]) ** 0.5 * group["lr"])


class Together:
    """Several optimizers that step, save and load as one."""

    def __init__(self, *parts):
        self.parts = parts

    @property
    def param_groups(self):
        return [group for part in self.parts for group in part.param_groups]

    def zero_grad(self, set_to_none=True):
        for part in self.parts:
            part.zero_grad(set_to_none)

    def state_dict(self):
        return {type(part).__name__: part.state_dict() for part in self.parts}

    def load_state_dict(self, state):
        for part in self.parts:
            part.load_state_dict(state[type(part).__name__])

"""The optimizer, and the learning rate's way from the first step to the last."""

import math

import torch

from trainer.muon import Muon, Together


def build_optimizer(model, args):
    """AdamW (Loshchilov & Hutter 2019) for all parameters, or Muon for the layers' matrices and AdamW for the rest.

    Matrices decay, norm weights do not. AdamW is one kernel for all parameters.
    """
    parameters = {name: x for name, x in model.named_parameters() if x.requires_grad}
    by_muon = {name for name, x in parameters.items()
               if args.optimizer == "muon" and x.dim() >= 2 and ".layers." in name and not name.endswith(".gate.weight")}
    rest = [x for name, x in parameters.items() if name not in by_muon]
    groups = [{"params": [x for x in rest if x.dim() >= 2], "weight_decay": args.weight_decay},
              {"params": [x for x in rest if x.dim() < 2], "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]  # adapters may have matrices alone; DeepSpeed wants no empty group
    muon = Muon([parameters[name] for name in sorted(by_muon)], args.learning_rate, args.weight_decay) if by_muon else None
    if not groups:
        return muon
    adamw = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, args.beta2), eps=1e-8, fused=True)
    return Together(muon, adamw) if muon else adamw


def learning_rate_at(step, num_steps, args):
    """Learning rate of `step` (from 0) out of `num_steps`: a linear warm-up, then what --schedule says.

    cosine: half a cosine from the peak to `min_lr_share` of it (Loshchilov & Hutter 2017, eq. 5). wsd: the peak, then
    a linear fall to `min_lr_share` over the last `decay_share` of the steps (Hu et al. 2024, section 4.2).
    """
    warmup = math.ceil(args.warmup_share * num_steps)
    if step < warmup:
        return args.learning_rate * (step + 1) / warmup
    if args.schedule == "cosine":
        done = (step - warmup) / max(1, num_steps - 1 - warmup)
        share = 0.5 * (1 + math.cos(math.pi * done))
    else:
        decay = math.ceil(args.decay_share * num_steps)
        share = min(1.0, (num_steps - 1 - step) / decay) if decay else 1.0
    return args.learning_rate * (args.min_lr_share + (1 - args.min_lr_share) * share)


def set_learning_rate(optimizer, learning_rate):
    for group in optimizer.param_groups:
        group["lr"] = learning_rate

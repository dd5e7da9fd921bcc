"""AdamW and the learning rate's way from the first step to the last."""

import math

import torch


def build_optimizer(model, args):
    """AdamW (Loshchilov & Hutter 2019); matrices decay, norm weights do not. One kernel for all on a GPU."""
    parameters = [x for x in model.parameters() if x.requires_grad]
    groups = [{"params": [x for x in parameters if x.dim() >= 2], "weight_decay": args.weight_decay},
              {"params": [x for x in parameters if x.dim() < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, args.beta2), eps=1e-8, fused=True)


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

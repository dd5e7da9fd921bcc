"""What a training step costs by its arithmetic, and how fast a device is at the two things that it is made of.

The formulas count operations and bytes from the configuration of a network; the rates are measured with one large matrix
product and one large copy. scripts/bench_training.py judges steps by them, scripts/doctor.py foretells steps.
"""

import time
from dataclasses import dataclass

import torch


def active_width(config):
    """Feed-forward channels that a token visits, over all of its experts."""
    if not config.num_experts:
        return config.intermediate_size
    return config.num_experts_per_tok * config.moe_intermediate_size + config.shared_expert_intermediate_size


def active_weights(config):
    """(weights of the layers' matrices that a token visits, weights of the head)."""
    D, H, K, d = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
    layer = D * (2 * H + 2 * K) * d + D * (3 * active_width(config) + config.num_experts)
    return config.num_hidden_layers * layer, config.vocab_size * D


def training_flops(config, positions, head_positions, pairs):
    """Floating-point operations of forward and backward.

    A weight is one multiplication and one addition per position in the forward and twice that in the backward: 6. A
    pair of positions is a query-key and a weight-value product of head_dim in each head, in each direction: 12.
    """
    body, head = active_weights(config)
    attention = 12 * config.num_hidden_layers * config.num_attention_heads * config.head_dim
    return 6 * (body * positions + head * head_positions) + attention * pairs


def elementwise_bytes(config, positions, targets):
    """Bytes that the operations between the matrix products read and write in forward and backward, roughly.

    Counted in passes over a float32 tensor: 14 for a norm, 18 for rotary positions, 14 for the gate, 4 for a residual
    sum, 12 for the cross-entropy. Only the proportions matter: the rate is measured.
    """
    heads = (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
    layer = 2 * (14 + 4) * config.hidden_size + (18 + 14 * config.qk_norm) * heads + 14 * active_width(config)
    if config.num_experts:  # rows are gathered, scattered and weighted
        layer += 9 * config.num_experts_per_tok * config.hidden_size
    return 4 * (positions * config.num_hidden_layers * layer + targets * 12 * config.vocab_size)


def memory_bytes(config, params, positions, dtype):
    """Bytes for a step: weights, gradients, two AdamW states, what backward needs of `positions`, and the logits.

    16 per parameter, 2 more where autocast keeps a copy. Per position and layer, in float32: the residual stream twice,
    and what the two norms keep, nine widths; in the type of the products: query, key and value before and after rotation,
    attention's output, four feed-forward widths. Logits, their log-softmax and two gradients of them: 16 per entry.
    """
    heads = (config.num_attention_heads + config.num_key_value_heads) * config.head_dim * (4 if config.qk_norm else 3)
    width = 4 if dtype == torch.float32 else 2
    layer = 44 * config.hidden_size + width * (heads + 4 * active_width(config))
    if config.num_experts:  # rows sorted by expert, and what the experts return
        layer += width * 3 * config.num_experts_per_tok * config.hidden_size
    weights = params * (16 if dtype == torch.float32 else 18)
    return weights + positions * (config.num_hidden_layers * layer + 16 * config.vocab_size)


@dataclass
class Rates:
    """The four constants of the estimate: operations and bytes per second, seconds per step and layer."""

    matrix: float
    copy: float
    elementwise: float
    step_per_layer: float = 0.0

    def seconds(self, config, params, device, positions, targets, pairs):
        """Seconds of an optimizer step; on a GPU launching its kernels and computing go on side by side."""
        launch = self.step_per_layer * config.num_hidden_layers
        update = params * 40 / self.copy  # AdamW reads 4 floats and writes 3, clipping reads one and writes two
        compute = training_flops(config, positions, targets, pairs) / self.matrix
        compute += elementwise_bytes(config, positions, targets) / self.elementwise + update
        return max(launch, compute) if device.type == "cuda" else launch + compute


def matrix_rate(device, dtype, size=None, seconds=0.3):
    """Floating-point operations per second of a large matrix product, without its first call."""
    size = size or (8192 if device.type == "cuda" else 1024)
    left, right = torch.randn(2, size, size, device=device).to(dtype)
    torch.mm(left, right)
    wait_for(device)
    start, count = time.perf_counter(), 0
    while count == 0 or time.perf_counter() - start < seconds:
        torch.mm(left, right)
        wait_for(device)
        count += 1
    return 2 * size**3 * count / (time.perf_counter() - start)


def copy_rate(device, seconds):
    """Bytes per second read plus written by a large copy."""
    source = torch.ones(2**26 if device.type == "cuda" else 2**24, device=device)
    target = source.clone()
    wait_for(device)
    start, count = time.perf_counter(), 0
    while count == 0 or time.perf_counter() - start < seconds:
        target.copy_(source)
        wait_for(device)
        count += 1
    return 2 * source.numel() * 4 * count / (time.perf_counter() - start)


def wait_for(device):
    """Until the device has done what it was given: its work runs beside Python's."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)

"""What a training step costs by its arithmetic, and how fast a device is at its two kinds of work.

The formulas count operations and bytes from the configuration of a network. The rates are measured
with one large matrix product and one large copy, or are the makers' peaks. Stages report their
fraction of the peak (MFU), the benchmark of training judges steps, scripts/doctor.py predicts them.
"""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from dataset.packing import IGNORE
from model.model_minimind import MiniMindConfig


def _peaks(text: str) -> dict[str, float]:
    return {
        name: float(peak) for name, _, peak in (one.rpartition(" ") for one in text.split(", "))
    }


# Dense bfloat16 products with float32 sums, TFLOP/s, from NVIDIA's data sheets (halved where they
# state it with sparsity) and architecture papers. A GeForce's tensor cores do twice its float32
# rate: 4 * cores * boost clock.
PEAK_BF16_FLOPS = _peaks(
    "A10 125, A30 165, A40 150, A100 312, A800 312, L4 121, L40 181, L40S 362, H100 989, "
    "H100 NVL 835, H100 PCIe 756, H800 989, H20 148, H200 989, GH200 989, B200 2250, "
    "RTX A6000 155, RTX 6000 Ada 364, RTX 3060 25, RTX 3060 Ti 32, RTX 3070 41, "
    "RTX 3070 Ti 43, RTX 3080 60, RTX 3080 Ti 68, RTX 3090 71, RTX 3090 Ti 80, RTX 4060 30, "
    "RTX 4060 Ti 44, RTX 4070 58, RTX 4070 SUPER 71, RTX 4070 Ti 80, RTX 4070 Ti SUPER 88, "
    "RTX 4080 97, RTX 4080 SUPER 104, RTX 4090 165, RTX 4090 D 147, RTX 5070 62, "
    "RTX 5070 Ti 88, RTX 5080 113, RTX 5090 210"
)
# Before Ampere there is neither bfloat16 nor TF32: (float16 products, float32 without tensor cores)
PEAK_FP16_FP32_FLOPS = {"V100": (125, 15.7), "T4": (65, 8.1), "RTX 2080 Ti": (54, 13.4)}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """The maker's peak of a GPU in dense matrix products, operations per second.

    None on a CPU or an unknown GPU. float32 is TF32 where there is one, at half the rate of
    bfloat16: the scripts allow it.
    """
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    if re.search(r"laptop|mobile|max-q", name, re.IGNORECASE):  # slower than its namesake card
        return None
    cards = (*PEAK_BF16_FLOPS, *PEAK_FP16_FP32_FLOPS)
    known = [card for card in cards if re.search(rf"\b{card}\b", name, re.IGNORECASE)]
    if not known:
        return None
    best = max(known, key=len)  # "RTX 4070 Ti SUPER" is not an "RTX 4070"
    if best in PEAK_BF16_FLOPS:
        return PEAK_BF16_FLOPS[best] * 1e12 / (2 if dtype == torch.float32 else 1)
    half, single = PEAK_FP16_FP32_FLOPS[best]
    return {torch.float16: half * 1e12, torch.float32: single * 1e12}.get(dtype)


def step_work(micro_batches: list[dict[str, torch.Tensor]]) -> tuple[int, int, int]:
    """(positions, targets, pairs of positions that see each other) of packed micro-batches.

    A document of n tokens has n (n + 1) / 2 pairs; it begins where `position_ids` are 0.
    """
    positions = targets = pairs = 0
    for micro in micro_batches:
        positions += micro["labels"].numel()
        targets += int((micro["labels"] != IGNORE).sum())
        pairs += int(micro["position_ids"].sum())  # a position sees those before it ...
    return positions, targets, pairs + positions  # ... and itself


def active_width(config: MiniMindConfig) -> int:
    """Feed-forward channels that a token visits, over all of its experts."""
    if not config.num_experts:
        return config.intermediate_size
    routed = config.num_experts_per_tok * config.moe_intermediate_size
    return routed + config.shared_expert_intermediate_size


def active_weights(config: MiniMindConfig) -> tuple[int, int]:
    """(weights of the layers' matrices that a token visits, weights of the head)."""
    D, H, K = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    layer = D * (2 * H + 2 * K) * config.head_dim
    layer += D * (3 * active_width(config) + config.num_experts)
    return config.num_hidden_layers * layer, config.vocab_size * D


def training_flops(
    config: MiniMindConfig, positions: int, targets: int, pairs: int, is_frozen: bool = False
) -> int:
    """Floating-point operations of forward and backward.

    A weight is one multiplication and one addition per position in the forward and twice that in
    the backward: 6; the head runs on targets alone. Frozen weights have no gradients of their own:
    4 (adapters are too small to count). A pair of positions is a query-key and a weight-value
    product of head_dim in each head, in each direction: 12.
    """
    body, head = active_weights(config)
    attention = 12 * config.num_hidden_layers * config.num_attention_heads * config.head_dim
    return (4 if is_frozen else 6) * (body * positions + head * targets) + attention * pairs


def elementwise_bytes(config: MiniMindConfig, positions: int, targets: int) -> int:
    """Bytes that the operations between the matrix products read and write, roughly.

    Counted in passes over a float32 tensor, forward and backward: 14 for a norm, 18 for rotary
    positions, 14 for the gate, 4 for a residual sum, 12 for the cross-entropy. Only the proportions
    matter: the rate is measured.
    """
    heads = (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
    layer = 2 * (14 + 4) * config.hidden_size + 14 * active_width(config)
    layer += (18 + 14 * config.qk_norm) * heads
    if config.num_experts:  # rows are gathered, scattered and weighted
        layer += 9 * config.num_experts_per_tok * config.hidden_size
    return 4 * (positions * config.num_hidden_layers * layer + targets * 12 * config.vocab_size)


@dataclass
class Rates:
    """Constants of the estimate: operations and bytes per second, seconds per step and layer."""

    matrix: float
    copy: float
    elementwise: float
    step_per_layer: float = 0.0

    def seconds(
        self,
        config: MiniMindConfig,
        params: int,
        device: torch.device,
        positions: int,
        targets: int,
        pairs: int,
    ) -> float:
        """Seconds of an optimizer step; on a GPU launching the kernels and computing overlap."""
        launch = self.step_per_layer * config.num_hidden_layers
        # AdamW reads 4 floats and writes 3, clipping reads one and writes two
        update = params * 40 / self.copy
        compute = training_flops(config, positions, targets, pairs) / self.matrix
        compute += elementwise_bytes(config, positions, targets) / self.elementwise + update
        return max(launch, compute) if device.type == "cuda" else launch + compute


def matrix_rate(
    device: torch.device, dtype: torch.dtype, size: int | None = None, seconds: float = 0.3
) -> float:
    """Floating-point operations per second of a large matrix product, without its first call."""
    size = size or (8192 if device.type == "cuda" else 1024)
    left, right = torch.randn(2, size, size, device=device).to(dtype)
    torch.mm(left, right)
    return 2 * size**3 * calls_per_second(lambda: torch.mm(left, right), device, seconds)


def copy_rate(device: torch.device, seconds: float) -> float:
    """Bytes per second read plus written by a large copy."""
    source = torch.ones(2**26 if device.type == "cuda" else 2**24, device=device)
    target = source.clone()
    calls = calls_per_second(lambda: target.copy_(source), device, seconds)
    return 2 * source.numel() * 4 * calls


def calls_per_second(call: Callable[[], object], device: torch.device, seconds: float) -> float:
    """How often the device does `call` in a second, measured for `seconds`, at least once."""
    wait_for(device)
    start, count = time.perf_counter(), 0
    while count == 0 or time.perf_counter() - start < seconds:
        call()
        wait_for(device)
        count += 1
    return count / (time.perf_counter() - start)


def wait_for(device: torch.device) -> None:
    """Wait until the device has finished: its work runs beside Python's."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)

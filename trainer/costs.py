"""What a training step costs by its arithmetic, and how fast a device is at the two things that it is made of.

The formulas count operations and bytes from the configuration of a network; the rates are measured with one large matrix
product and one large copy, or are the makers' peaks. Stages report their share of the peak by them (MFU),
scripts/bench_training.py judges steps, scripts/doctor.py foretells steps.
"""

import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from dataset.packing import IGNORE

MARGIN = 0.9  # of the free memory may be planned for: the estimate is rough, and memory gets fragmented
OWN_GROUPS = Path("/proc/self/cgroup")
SHORTEST = 64  # tokens of a row that are worth training on

# Dense bfloat16 products with float32 sums, TFLOP/s, from NVIDIA's data sheets (what they state with sparsity is halved)
# and architecture papers. A GeForce's tensor cores do twice its float32 rate: 4 * cores * boost clock.
PEAK_BF16_FLOPS = {
    "A10": 125, "A30": 165, "A40": 150, "A100": 312, "A800": 312, "L4": 121, "L40": 181, "L40S": 362,
    "H100": 989, "H100 NVL": 835, "H100 PCIe": 756, "H800": 989, "H20": 148, "H200": 989, "GH200": 989, "B200": 2250,
    "RTX A6000": 155, "RTX 6000 Ada": 364,
    "RTX 3060": 25, "RTX 3060 Ti": 32, "RTX 3070": 41, "RTX 3070 Ti": 43, "RTX 3080": 60, "RTX 3080 Ti": 68, "RTX 3090": 71,
    "RTX 3090 Ti": 80, "RTX 4060": 30, "RTX 4060 Ti": 44, "RTX 4070": 58, "RTX 4070 SUPER": 71, "RTX 4070 Ti": 80,
    "RTX 4070 Ti SUPER": 88, "RTX 4080": 97, "RTX 4080 SUPER": 104, "RTX 4090": 165, "RTX 4090 D": 147,
    "RTX 5070": 62, "RTX 5070 Ti": 88, "RTX 5080": 113, "RTX 5090": 210,
}
# Before Ampere there is neither bfloat16 nor TF32: (float16 products, float32 outside of the tensor cores)
PEAK_FP16_FP32_FLOPS = {"V100": (125, 15.7), "T4": (65, 8.1), "RTX 2080 Ti": (54, 13.4)}


def peak_flops(device, dtype):
    """The maker's peak of a GPU in dense matrix products, operations per second; None on a CPU or an unknown GPU.

    float32 is TF32 where there is one, at half the rate of bfloat16: the scripts allow it.
    """
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    if re.search(r"laptop|mobile|max-q", name, re.IGNORECASE):  # slower than the card of the same name
        return None
    known = [one for one in (*PEAK_BF16_FLOPS, *PEAK_FP16_FP32_FLOPS) if re.search(rf"\b{one}\b", name, re.IGNORECASE)]
    if not known:
        return None
    best = max(known, key=len)  # "RTX 4070 Ti SUPER" is not an "RTX 4070"
    if best in PEAK_BF16_FLOPS:
        return PEAK_BF16_FLOPS[best] * 1e12 / (2 if dtype == torch.float32 else 1)
    half, single = PEAK_FP16_FP32_FLOPS[best]
    return {torch.float16: half * 1e12, torch.float32: single * 1e12}.get(dtype)


def step_work(micro_batches):
    """(positions, targets, pairs of positions that see each other) of packed micro-batches on the CPU, three ints.

    A document of n tokens has n (n + 1) / 2 pairs; it begins where `position_ids` are 0.
    """
    positions = targets = pairs = 0
    for micro in micro_batches:
        positions += micro["labels"].numel()
        targets += int((micro["labels"] != IGNORE).sum())
        pairs += int(micro["position_ids"].sum())  # a position sees those before it ...
    return positions, targets, pairs + positions  # ... and itself


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


def training_flops(config, positions, head_positions, pairs, is_frozen=False):
    """Floating-point operations of forward and backward.

    A weight is one multiplication and one addition per position in the forward and twice that in the backward: 6. Frozen
    weights have no gradients of their own: 4 (what is trained beside them is too small to count). A pair of positions is a
    query-key and a weight-value product of head_dim in each head, in each direction: 12.
    """
    body, head = active_weights(config)
    attention = 12 * config.num_hidden_layers * config.num_attention_heads * config.head_dim
    return (4 if is_frozen else 6) * (body * positions + head * head_positions) + attention * pairs


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


def memory_bytes(config, params, positions, dtype, *, trained=None, gradient_checkpointing=False, optimizer="adamw",
                 zero_stage=0, world_size=1, offload_optimizer=False):
    """Bytes on one device for a step: parameters, gradients, optimizer states, what backward needs of `positions`, logits.

    4 bytes each per parameter for itself, its gradient and each state (AdamW has two, Muon one for a matrix of a layer), 2
    more where autocast keeps a copy; gradient and states only for `trained` of them (default: all). Ranks share the states
    at ZeRO stage 1, the gradients too at 2, the parameters too at 3 (Rajbhandari et al. 2020, figure 1). Per position and
    layer, in float32: the residual stream twice, and what the two norms keep, nine widths; in the type of the products:
    query, key and value before and after rotation, attention's output, four feed-forward widths. With checkpointing, a layer
    keeps its input, and one at a time all of that. Logits, their log-softmax and two gradients of them: 16 per entry, for as
    many targets as positions.
    """
    width, layers = 4 if dtype == torch.float32 else 2, config.num_hidden_layers
    heads = (config.num_attention_heads + config.num_key_value_heads) * config.head_dim * (4 if config.qk_norm else 3)
    layer = 44 * config.hidden_size + width * (heads + 4 * active_width(config))
    if config.num_experts:  # rows sorted by expert, and what the experts return
        layer += width * 3 * config.num_experts_per_tok * config.hidden_size
    kept = layers * 4 * config.hidden_size + layer if gradient_checkpointing else layers * layer

    trained = params if trained is None else trained
    states = 2 * trained - (min(trained, matrices_of_layers(config)) if optimizer == "muon" else 0)
    share = [world_size if zero_stage >= stage else 1 for stage in (1, 2, 3)]
    weights = (0 if offload_optimizer else 4 * states / share[0]) + 4 * trained / share[1]
    weights += params * (4 if dtype == torch.float32 else 6) / share[2]
    return int(weights + positions * (kept + 16 * config.vocab_size))


def matrices_of_layers(config):
    """Weights in the layers' matrices, those of all experts, which Muon trains; the router's are AdamW's."""
    D, H, K, d = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
    width = config.intermediate_size
    if config.num_experts:
        width = config.num_experts * config.moe_intermediate_size + config.shared_expert_intermediate_size
    return config.num_hidden_layers * (D * (2 * H + 2 * K) * d + 3 * D * width)


def free_memory(device):
    """Bytes that this process may still take on `device`, or None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    info = Path("/proc/meminfo")
    if not info.is_file():  # not Linux: the system counts pages, or does not say
        counts = "SC_AVPHYS_PAGES" in getattr(os, "sysconf_names", {})
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if counts else None
    free = int(dict(line.split(":", 1) for line in info.read_text().splitlines())["MemAvailable"].split()[0]) * 1024
    return min([free, *container_limits(Path("/sys/fs/cgroup"))])


def container_limits(root):
    """Bytes left under the limits of the container or job that this process runs in (control groups, version 2 and 1)."""
    paths = [line.split(":", 2)[1:] for line in OWN_GROUPS.read_text().splitlines()] if OWN_GROUPS.is_file() else []
    for controllers, path in paths:
        if controllers not in ("", "memory"):
            continue
        names = ("memory.max", "memory.current", "inactive_file") if not controllers else (
            "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        folder = root / controllers / path.strip("/")
        for group in (folder, *folder.parents):
            if not group.is_relative_to(root):
                break
            limit, used, stat = (group / name for name in (*names[:2], "memory.stat"))
            if all(file.is_file() for file in (limit, used, stat)) and limit.read_text().strip().isdigit():
                cached = dict(line.split() for line in stat.read_text().splitlines())[names[2]]  # given up on demand
                yield int(limit.read_text()) - int(used.read_text()) + int(cached)


def memory_advice(config, model, args, device, dtype, *, trained=None, zero_stage=0, world_size=1, offload_optimizer=False):
    """(bytes that a step needs, bytes there are for it or None, a sentence for the user), with `model` on its device already.

    args: batch_size, accumulation_steps, ACCUMULATES, max_seq_len, optimizer, gradient_checkpointing. Where the step will not
    fit, the sentence names flags under which it will. The numbers are of one device out of `world_size`.
    """
    params, free = model.num_parameters(), free_memory(device)
    needs = step_needs(config, params, args, dtype, trained=trained, zero_stage=zero_stage, world_size=world_size,
                       offload_optimizer=offload_optimizer)
    needed = needs(args.batch_size, args.gradient_checkpointing, args.max_seq_len)
    if free is None:
        return needed, None, f"a step needs about {needed / 1e9:.1f} GB of memory"
    room = free + 4 * params / (world_size if zero_stage >= 3 else 1)  # the parameters are there already
    if needed <= MARGIN * room:
        return needed, room, f"a step needs about {needed / 1e9:.1f} of the {room / 1e9:.1f} GB free"
    return needed, room, (f"a step needs about {needed / 1e9:.1f} GB of memory, but only {room / 1e9:.1f} GB are free: "
                          + way_out(args, needs, MARGIN * room))


def step_needs(config, params, args, dtype, **sharing):
    """needs(batch_size, checkpointing, length): bytes of a step on one device with these in place of what `args` says."""
    def needs(batch_size, checkpointing, length):
        return memory_bytes(config, params, batch_size * length, dtype, gradient_checkpointing=checkpointing,
                            optimizer=args.optimizer, **sharing)
    return needs


def way_out_of_failure(args, needs, room, is_saved):
    """What to change after a step did not fit, whatever the estimate said: the next choice that takes less than it.

    room: bytes there were for it, by the estimate, or None. is_saved: whether there is a checkpoint to go on from.
    """
    less = needs(args.batch_size, args.gradient_checkpointing, args.max_seq_len) - 1
    return way_out(args, needs, less if room is None else min(less, MARGIN * room), is_saved)


def way_out(args, needs, room, is_saved=False):
    """What to change so that a step fits into `room` bytes, cheapest first; needs(batch_size, checkpointing, length): bytes.

    is_saved: there is a checkpoint, with which another length or shape cannot go on.
    """
    resume, anew = (" --from_resume", ", in a new run under another --save_weight") if is_saved else ("", "")
    rows = args.batch_size * args.accumulation_steps
    sizes = [size for size in range(args.batch_size, 0, -1) if rows % size == 0 or not args.ACCUMULATES]

    def batch(size):  # with as many rows in a step as before
        return f"--batch_size {size}" + (f" --accumulation_steps {rows // size}" if args.ACCUMULATES else "")

    for checkpointing in (True,) if args.gradient_checkpointing else (False, True):
        flag = " --gradient_checkpointing" if checkpointing else ""
        for size in sizes:
            needed = needs(size, checkpointing, args.max_seq_len)
            if needed <= room:
                return f"{batch(size)}{flag}{resume} gives the same update in {needed / 1e9:.1f} GB"
    length = args.max_seq_len // 2
    while length >= SHORTEST and needs(1, True, length) > room:
        length //= 2
    if length >= SHORTEST:
        return (f"not even one row at a time fits; {batch(1)} --gradient_checkpointing --max_seq_len {length} does, in "
                f"{needs(1, True, length) / 1e9:.1f} GB{anew}")
    sharing = f"share them among GPUs with --deepspeed{resume}, or " if args.ACCUMULATES else ""
    return (f"the weights and their optimizer are too large: {sharing}choose a smaller --preset{anew}")


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

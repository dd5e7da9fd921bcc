"""How much memory a training step needs, how much there is, and which flags make it fit."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from model.model_minimind import MiniMindConfig
from trainer.runtime.costs import active_width
from trainer.runtime.stage_args import TrainArgs

MARGIN = 0.9  # of the free memory may be planned for: the estimate is rough, and memory fragments
OWN_GROUPS = Path("/proc/self/cgroup")
# of a control group, version 2 and 1: the limit, the use, and the part of it given up on demand
GROUP_V2 = ("memory.max", "memory.current", "inactive_file")
GROUP_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
SHORTEST = 64  # tokens of a batch row that are worth training on

Needs = Callable[[int, bool, int], int]


@dataclass(frozen=True)
class StepSettings:
    """The settings that decide the memory of a step, besides the network and its positions.

    trained: parameters that get gradients (None: all). Ranks share the optimizer's states at ZeRO
    stage 1, the gradients too at 2, the parameters too at 3.
    """

    dtype: torch.dtype = torch.float32
    optimizer: str = "adamw"
    gradient_checkpointing: bool = False
    trained: int | None = None
    zero_stage: int = 0
    world_size: int = 1
    offload_optimizer: bool = False


def memory_bytes(
    config: MiniMindConfig, params: int, positions: int, settings: StepSettings
) -> int:
    """Bytes on one device for a step: parameters, gradients, states, activations, logits.

    4 bytes each per parameter for itself, its gradient and each state (AdamW has two, Muon one for
    a matrix of a layer), 2 more where autocast keeps a copy (Rajbhandari et al. 2020, figure 1).
    Per position and layer, in float32: the residual stream twice, and the inputs of the two norms,
    nine widths; in the type of the products: query, key and value before and after rotation, the
    attention's output, four feed-forward widths. With checkpointing each layer keeps its input, and
    one at a time all of that. Logits, log-softmax and two gradients of them: 16 per entry, for as
    many targets as positions.
    """
    width, layers = 4 if settings.dtype == torch.float32 else 2, config.num_hidden_layers
    heads = (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
    heads *= 4 if config.qk_norm else 3
    layer = 44 * config.hidden_size + width * (heads + 4 * active_width(config))
    if config.num_experts:  # rows sorted by expert, and the experts' outputs
        layer += width * 3 * config.num_experts_per_tok * config.hidden_size
    kept = layers * layer
    if settings.gradient_checkpointing:
        kept = layers * 4 * config.hidden_size + layer

    trained = params if settings.trained is None else settings.trained
    states = 2 * trained
    if settings.optimizer == "muon":
        states -= min(trained, matrices_of_layers(config))
    parts = [settings.world_size if settings.zero_stage >= stage else 1 for stage in (1, 2, 3)]
    weights = (0 if settings.offload_optimizer else 4 * states / parts[0]) + 4 * trained / parts[1]
    weights += params * (4 if settings.dtype == torch.float32 else 6) / parts[2]
    return int(weights + positions * (kept + 16 * config.vocab_size))


def matrices_of_layers(config: MiniMindConfig) -> int:
    """Weights in the layers' matrices, of all experts, which Muon trains; the router is AdamW's."""
    D, H, d = config.hidden_size, config.num_attention_heads, config.head_dim
    width = config.intermediate_size
    if config.num_experts:
        width = config.num_experts * config.moe_intermediate_size
        width += config.shared_expert_intermediate_size
    attention = D * 2 * (H + config.num_key_value_heads) * d
    return config.num_hidden_layers * (attention + 3 * D * width)


def free_memory(device: torch.device) -> int | None:
    """Bytes that this process may still take on `device`, or None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    info = Path("/proc/meminfo")
    if not info.is_file():  # not Linux: the system counts pages, or does not say
        counts = "SC_AVPHYS_PAGES" in getattr(os, "sysconf_names", {})
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if counts else None
    sizes = dict(line.split(":", 1) for line in info.read_text("utf-8").splitlines())
    free = 1024 * int(sizes["MemAvailable"].split()[0])
    return min([free, *container_limits(Path("/sys/fs/cgroup"))])


def container_limits(root: Path) -> Iterator[int]:
    """Bytes left under the limits of this process's container or job (control groups 2 and 1)."""
    lines = OWN_GROUPS.read_text("utf-8").splitlines() if OWN_GROUPS.is_file() else []
    for controllers, path in (line.split(":", 2)[1:] for line in lines):
        if controllers not in ("", "memory"):
            continue
        names = GROUP_V1 if controllers else GROUP_V2
        folder = root / controllers / path.strip("/")
        for group in (folder, *folder.parents):
            if not group.is_relative_to(root):
                break
            limit, used, stat = (group / name for name in (*names[:2], "memory.stat"))
            is_there = all(file.is_file() for file in (limit, used, stat))
            if is_there and limit.read_text("utf-8").strip().isdigit():
                cached = dict(line.split() for line in stat.read_text("utf-8").splitlines())[
                    names[2]
                ]
                yield int(limit.read_text("utf-8")) - int(used.read_text("utf-8")) + int(cached)


class StepMemory:
    """The memory of a run's steps: what one needs under other flags, and the room for it.

    `needs(batch_size, checkpointing, length)` -> bytes of a step on one device with these instead
    of the flags' values. `room`: bytes for it, the loaded weights included, or None if unknown.
    """

    def __init__(
        self, model: torch.nn.Module, args: TrainArgs, device: torch.device, settings: StepSettings
    ):
        self.args, params = args, model.num_parameters()
        self.needs: Needs = lambda batch_size, checkpointing, length: memory_bytes(
            model.config,
            params,
            batch_size * length,
            replace(settings, gradient_checkpointing=checkpointing),
        )
        free = free_memory(device)
        loaded = 4 * params / (settings.world_size if settings.zero_stage >= 3 else 1)
        self.room = None if free is None else free + loaded
        self.needed = self.needs(args.batch_size, args.gradient_checkpointing, args.max_seq_len)

    def __str__(self) -> str:
        """A sentence: the need and the room; where the step will not fit, the flags that help."""
        need = f"a step needs about {self.needed / 1e9:.1f}"
        if self.room is None:
            return f"{need} GB of memory"
        if self.needed <= MARGIN * self.room:
            return f"{need} of the {self.room / 1e9:.1f} GB free"
        fix = memory_fix(self.args, self.needs, MARGIN * self.room)
        return f"{need} GB of memory, but only {self.room / 1e9:.1f} GB are free: {fix}"

    def fix(self, is_saved: bool) -> str:
        """What to change after a step did not fit, whatever the estimate said."""
        less = self.needed - 1
        room = less if self.room is None else min(less, MARGIN * self.room)
        return memory_fix(self.args, self.needs, room, is_saved)


def memory_fix(args: TrainArgs, needs: Needs, room: float, is_saved: bool = False) -> str:
    """What to change so that a step fits into `room` bytes, cheapest first.

    is_saved: there is a checkpoint, which cannot be resumed with another length or shape.
    """
    resume, anew = "", ""
    if is_saved:
        resume, anew = " --from_resume", ", in a new run under another --save_weight"
    rows = args.batch_size * args.accumulation_steps
    sizes = range(args.batch_size, 0, -1)

    def batch(size: int) -> str:  # with as many batch rows in a step as before
        steps = f" --accumulation_steps {rows // size}" if args.ACCUMULATES else ""
        return f"--batch_size {size}{steps}"

    for checkpointing in (True,) if args.gradient_checkpointing else (False, True):
        flag = " --gradient_checkpointing" if checkpointing else ""
        for size in (size for size in sizes if rows % size == 0 or not args.ACCUMULATES):
            needed = needs(size, checkpointing, args.max_seq_len)
            if needed <= room:
                return f"{batch(size)}{flag}{resume} gives the same update in {needed / 1e9:.1f} GB"
    length = args.max_seq_len // 2
    while length >= SHORTEST and needs(1, True, length) > room:
        length //= 2
    if length >= SHORTEST:
        return (
            f"not even one batch row at a time fits; {batch(1)} --gradient_checkpointing "
            f"--max_seq_len {length} does, in {needs(1, True, length) / 1e9:.1f} GB{anew}"
        )
    sharing = ""
    if args.ACCUMULATES:
        sharing = f"distribute them over GPUs with --deepspeed{resume}, or "
    return (
        f"the weights and their optimizer are too large: {sharing}choose a smaller --preset{anew}"
    )

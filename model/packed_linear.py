"""Layers for decoding on a CPU: the same numbers, from weights that are laid out once for few rows
at a time.

One token a step means reading every weight once for very little arithmetic: the speed is that of
the memory. oneDNN's blocked layout reads float32 weights about twice as fast
as `F.linear` does (docs/LOG.md), and int8 weights are a quarter of the bytes.
"""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from .model_lora import fold_adapters
from .model_minimind import Attention, Experts, MiniMindForCausalLM, SwiGLU

ROWS_HINT = 16  # number of rows for which the blocked layout is chosen
INT8_ROWS = 32  # with more (a prompt) arithmetic costs more than reading: float32 is faster

LinearClass = Callable[[torch.Tensor], nn.Module]  # makes a layer of a weight [out, in]


class PackedLinear(nn.Module):
    """x W^T in float32 from oneDNN's blocked layout; weight [out, in]."""

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        weight = weight.detach().float().contiguous()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS_HINT)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, None, "none", [], "")


class Int8Linear(nn.Module):
    """x W^T from int8 weights with one scale per output channel (symmetric, round to nearest) and
    bfloat16 activations.

    Each weight is off by at most half a 127th of the largest of its row (Dettmers et al. 2022,
    section 2.1, per row).
    """

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        weight = weight.detach().float()
        scales = weight.abs().amax(1).clamp(min=1e-8) / 127
        self.register_buffer("weight", (weight / scales[:, None]).round().to(torch.int8))  # out in
        self.register_buffer("scales", scales)
        self.register_buffer("short_scales", scales.bfloat16())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        if len(flat) > INT8_ROWS:
            return F.linear(x, self.weight.float() * self.scales[:, None])
        out = torch._weight_int8pack_mm(flat.bfloat16(), self.weight, self.short_scales)
        return out.float().view(*x.shape[:-1], -1)


class PackedAttention(Attention):
    """`Attention` with the three projections of its input in one."""

    def __init__(self, attention: Attention, linear: LinearClass):
        nn.Module.__init__(self)
        self.layer_idx, self.head_dim = attention.layer_idx, attention.head_dim
        parts = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
        self.widths = [len(part) for part in parts]
        self.qkv_proj, self.o_proj = linear(torch.cat(parts)), linear(attention.o_proj.weight)
        self.q_norm, self.k_norm = attention.q_norm, attention.k_norm

    def project(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.qkv_proj(x).split(self.widths, dim=-1)


class PackedSwiGLU(nn.Module):
    """`SwiGLU` with gate and up in one."""

    def __init__(self, mlp: SwiGLU, linear: LinearClass):
        super().__init__()
        self.gate_up_proj = linear(torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]))
        self.down_proj = linear(mlp.down_proj.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class PackedExperts(nn.Module):
    """`Experts` with each matrix laid out by itself; experts without tokens are not touched."""

    def __init__(self, experts: Experts, linear: LinearClass):
        super().__init__()
        self.gate_up = nn.ModuleList(linear(weight) for weight in experts.gate_up_proj)
        self.down = nn.ModuleList(linear(weight) for weight in experts.down_proj)

    def forward(self, x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """x [rows, D] sorted by expert, counts [E] rows of each expert -> [rows, D]."""
        outs = []
        for gate_up, down, rows in zip(self.gate_up, self.down, x.split(counts.tolist())):
            if len(rows):
                gate, up = gate_up(rows).chunk(2, dim=-1)
                outs.append(down(F.silu(gate) * up))
        return torch.cat(outs)


def for_decoding(
    model: MiniMindForCausalLM, dtype: torch.dtype = torch.float32, int8: bool = False
) -> MiniMindForCausalLM:
    """A copy of the language model that decodes fast on its device; later changes of `model` do not
    reach it.

    On a CPU every linear layer is packed (float32) or, with int8, quantized. Elsewhere it is a copy
    in `dtype`. Active adapters are merged into it. ValueError for int8 on another device: it makes
    a CPU faster, nothing else.
    """
    if model.device.type != "cpu":
        if int8:
            raise ValueError(
                f"int8 weights make a CPU faster, and this model is on {model.device}: leave int8 "
                "out"
            )
        return fold_adapters(copy.deepcopy(model)).to(dtype).eval()
    twin = fold_adapters(copy.deepcopy(model).float()).eval()
    linear = Int8Linear if int8 else PackedLinear
    packed = {Attention: PackedAttention, SwiGLU: PackedSwiGLU, Experts: PackedExperts}
    for parent in list(twin.modules()):
        for name, child in list(parent.named_children()):
            if type(child) in packed:
                setattr(parent, name, packed[type(child)](child, linear))
    twin.lm_head = linear(twin.lm_head.weight)
    return twin.requires_grad_(False)

"""MiniMind: a decoder-only transformer, dense or mixture-of-experts, in one file to be read from
top to bottom.

Pre-norm RMSNorm, rotary positions (with YaRN for longer contexts), grouped-query attention, SwiGLU,
tied embeddings. With `qk_norm` the network is exactly Qwen3 (dense) or Qwen3-MoE, without it Llama;
with a shared expert it is GraniteMoeShared. `native_format.py` writes and reads checkpoints of
those standard architectures.

Shape letters, used in comments throughout:
    B batch   T tokens of this call   S keys seen so far (S = T without a cache)   N = B * T
    D model width   H query heads   K key/value heads   d head width   F feed-forward width
    E experts   k experts per token   G documents of the batch   V vocabulary
"""

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, MoeCausalLMOutputWithPast

from .legacy_format import known_beside, read_pickle, shape_of
from .native_format import load_strictly, our_names, read_config, read_state, write_folder
from .presets import PRESETS


class MiniMindConfig(PreTrainedConfig):
    """The shape of a network; `MiniMindConfig.from_preset("minimind-3")` gives a named one.

    Widths are in channels. `head_dim` defaults to `hidden_size / num_attention_heads`.
    `num_experts=0` is dense; otherwise every feed-forward is `num_experts` experts of
    `moe_intermediate_size` (default `intermediate_size`), of which each token visits
    `num_experts_per_tok`, plus one that all tokens visit if `shared_expert_intermediate_size` is
    not 0. `rope_parameters` is transformers' dict: `rope_theta` and, for YaRN, `rope_type="yarn"`,
    `factor`, `original_max_position_embeddings`.

    Raises ValueError for shapes that cannot be built.
    """

    model_type = "minimind"
    default_theta = 1e6
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 6400
    hidden_size: int = 768
    intermediate_size: int = 2432
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int | None = None
    qk_norm: bool = False
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 32768
    rope_parameters: dict | None = None
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02
    dropout: float = 0.0
    use_cache: bool = True
    num_experts: int = 0
    num_experts_per_tok: int = 1
    moe_intermediate_size: int | None = None
    shared_expert_intermediate_size: int = 0
    norm_topk_prob: bool = False
    router_aux_loss_coef: float = 0.01
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = 2

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        D, E = self.hidden_size, self.num_experts
        H, K = self.num_attention_heads, self.num_key_value_heads
        if self.head_dim is None:
            if D % H:
                raise ValueError(
                    f"hidden_size {D} is not a multiple of num_attention_heads {H}: change one of "
                    "them or give head_dim"
                )
            self.head_dim = D // H
        if self.head_dim % 2:
            raise ValueError(
                f"head_dim {self.head_dim} is odd: rotary positions need pairs of channels"
            )
        if H % K:
            raise ValueError(
                f"num_attention_heads {H} is not a multiple of num_key_value_heads {K}: each "
                "key/value head serves the same number of query heads"
            )
        if E:
            self.moe_intermediate_size = self.moe_intermediate_size or self.intermediate_size
            if not 1 <= self.num_experts_per_tok <= E:
                raise ValueError(
                    f"num_experts_per_tok {self.num_experts_per_tok} must lie between 1 and "
                    f"num_experts {E}"
                )
        if (kind := self.rope_parameters["rope_type"]) not in ("default", "yarn"):
            raise ValueError(f"rope_type {kind!r} is not built here: use 'default' or 'yarn'")

    @classmethod
    def from_preset(cls, name: str, **overrides: object) -> "MiniMindConfig":
        """The configuration of a named preset, with single fields replaced by `overrides`."""
        if name not in PRESETS:
            raise ValueError(f"no preset is named {name!r}; there are {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **overrides})


class RMSNorm(nn.Module):
    """Root-mean-square normalisation, in float32, over channels (Zhang & Sennrich 2019, eq. 4)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).type_as(x)


def rope_frequencies(
    config: PreTrainedConfig, device: torch.device | None = None
) -> tuple[torch.Tensor, float]:
    """Angle per position of each channel pair [d / 2], float32, and the factor on cos and sin.

    RoPE: Su et al. 2021, section 3.2.2. YaRN: Peng et al. 2023, equations 17 to 22: channels that
    turn often inside the original context keep their frequency, those that turn less than once are
    slowed down by `factor`, and those in between are blended.
    """
    rope, d = config.rope_parameters, config.head_dim
    theta = rope["rope_theta"]
    pair = torch.arange(0, d, 2, device=device, dtype=torch.float32)
    inv_freq = 1.0 / (theta ** (pair / d))
    if rope["rope_type"] == "default":
        return inv_freq, 1.0

    factor, original = rope["factor"], rope["original_max_position_embeddings"]

    def pair_that_turns(times: float) -> float:  # inside the original context; a fraction
        return d * math.log(original / (times * 2 * math.pi)) / (2 * math.log(theta))

    low = pair_that_turns(rope.get("beta_fast") or 32)
    high = pair_that_turns(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, d - 1)
    slowed = ((pair / 2 - low) / max(high - low, 1e-3)).clamp(0, 1)  # 0: unchanged, 1: by `factor`
    inv_freq = inv_freq * (1 - slowed) + inv_freq / factor * slowed
    default = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
    return inv_freq, rope.get("attention_factor") or default


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn each channel pair (i, i + d/2) of x [B, T, heads, d] by its position's angle; cos, sin
    [B or 1, T, 1, d].
    """
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


def document_ids(position_ids: torch.Tensor) -> torch.Tensor:
    """Number the documents of a packed batch: position_ids [B, T] -> ids [N], counted over all
    batch rows.

    A document starts at every row's first token and wherever the position is not its neighbour's
    plus one.
    """
    starts = torch.ones_like(position_ids, dtype=torch.bool)
    starts[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
    return starts.flatten().cumsum(0) - 1


def attention_mask_for(
    attention_mask: torch.Tensor | None,
    doc_ids: torch.Tensor | None,
    shape: tuple[int, int],
    num_keys: int,
    num_past: int,
    device: torch.device,
) -> torch.Tensor | None:
    """Which key each query may see: a bool mask broadcastable to [B, 1, T, S], or None for plain
    causal attention.

    attention_mask: None, [B, S] with 0 on padding, or a finished 4-d mask, bool or additive
    (transformers makes one for its static caches). doc_ids: [N] for packed sequences. shape: B, T.
    A padded query sees itself: a row without any key would be NaN.
    """
    B, T = shape
    if attention_mask is not None and attention_mask.dim() == 4:
        return attention_mask
    is_padded = attention_mask is not None and not bool(attention_mask.all())
    if doc_ids is None and not is_padded and (num_past == 0 or T == 1) and num_keys == num_past + T:
        return None
    query = torch.arange(num_past, num_past + T, device=device)[:, None]  # T 1
    key = torch.arange(num_keys, device=device)  # S
    mask = (key <= query)[None, None]  # 1 1 T S
    if doc_ids is not None:
        doc_ids = doc_ids.view(B, 1, T)
        mask = mask & (doc_ids[..., None] == doc_ids[:, :, None])  # B 1 T S
    if is_padded:
        visible = F.pad(attention_mask.bool(), (0, num_keys - attention_mask.shape[1]))  # B S
        mask = (mask & visible[:, None, None]) | (key == query)
    return mask


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads (Ainslie et al. 2023)."""

    def __init__(self, config: MiniMindConfig, layer_idx: int):
        super().__init__()
        D, d = config.hidden_size, config.head_dim
        H, K = config.num_attention_heads, config.num_key_value_heads
        self.layer_idx, self.head_dim = layer_idx, d
        self.q_proj = nn.Linear(D, H * d, bias=False)
        self.k_proj = nn.Linear(D, K * d, bias=False)
        self.v_proj = nn.Linear(D, K * d, bias=False)
        self.o_proj = nn.Linear(H * d, D, bias=False)
        self.q_norm = RMSNorm(d, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(d, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def project(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def forward(
        self,
        x: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor | None = None,
        doc_lengths: list[int] | None = None,
        past_key_values: Cache | None = None,
    ) -> torch.Tensor:
        """x [B, T, D] -> [B, T, D]; rope: cos and sin; doc_lengths: see `attend_per_document`."""
        B, T, _ = x.shape
        q, k, v = (y.view(B, T, -1, self.head_dim) for y in self.project(x))  # B T heads d
        # under autocast cos and sin are float32
        q, k = (rotate(y, *rope).type_as(v) for y in (self.q_norm(q), self.k_norm(k)))
        if doc_lengths is not None:
            out = self.attend_per_document(q, k, v, doc_lengths)
        else:
            q, k, v = (y.transpose(1, 2) for y in (q, k, v))  # B heads T d
            if past_key_values is not None:
                k, v = past_key_values.update(k, v, self.layer_idx)  # B K S d
            if T == 1 and k.shape[2] > 1:  # the heads of a key become its queries: no copy of keys
                q = q.view(B, k.shape[1], -1, self.head_dim)  # B K H/K d
            causal = mask is None and T > 1
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True
            )
            out = out.reshape(B, -1, T, self.head_dim).transpose(1, 2)  # B T H d
        return self.o_proj(out.reshape(B, T, -1))

    @staticmethod
    def attend_per_document(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, doc_lengths: list[int]
    ) -> torch.Tensor:
        """Packed sequences, one document at a time: no work on pairs of tokens of different ones.

        q, k, v [B, T, heads, d] -> [1, N, H, d].
        """
        q, k, v = (y.flatten(0, 1).transpose(0, 1)[None] for y in (q, k, v))  # 1 heads N d
        parts = zip(*(y.split(doc_lengths, dim=2) for y in (q, k, v)))
        attend = partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=True)
        return torch.cat([attend(*qkv) for qkv in parts], dim=2).transpose(1, 2)


class SwiGLU(nn.Module):
    """Gated feed-forward, down(silu(gate(x)) * up(x)) (Shazeer 2020, eq. 6)."""

    def __init__(self, config: MiniMindConfig, width: int):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def expert_linear(x: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Each row through the matrix of its expert: x [rows, in] sorted by expert, weight [E, out,
    in], counts [E] rows of each expert -> [rows, out].
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    is_aligned = not any(size % 8 for size in weight.shape[1:])  # the kernel reads 16 bytes at once
    if x.is_cuda and dtype == torch.bfloat16 and is_aligned:
        # one kernel for all experts, no wait for the counts
        return F.grouped_mm(x.to(dtype), weight.to(dtype).mT, offs=counts.cumsum(0).int())
    rows_of = x.split(counts.tolist())
    return torch.cat([F.linear(rows, matrix) for rows, matrix in zip(rows_of, weight)])


class Experts(nn.Module):
    """E SwiGLU networks, one tensor per projection: each step touches every parameter."""

    def __init__(self, config: MiniMindConfig):
        super().__init__()
        E, D, width = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * width, D))
        self.down_proj = nn.Parameter(torch.empty(E, D, width))

    def forward(self, x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """x [rows, D] sorted by expert, counts [E] rows of each expert -> [rows, D]."""
        gate, up = expert_linear(x, self.gate_up_proj, counts).chunk(2, dim=-1)
        return expert_linear(F.silu(gate) * up, self.down_proj, counts)


class MixtureOfExperts(nn.Module):
    """Top-k routed experts and, optionally, one that every token visits.

    With one expert per token its weight is the router's own probability (`norm_topk_prob=False`):
    renormalised, it would be the constant 1 and the language-model loss would teach the router
    nothing.
    """

    def __init__(self, config: MiniMindConfig):
        super().__init__()
        self.top_k, self.norm_topk_prob = config.num_experts_per_tok, config.norm_topk_prob
        self.num_experts = E = config.num_experts
        self.gate = nn.Linear(config.hidden_size, E, bias=False)
        self.experts = Experts(config)
        # training's load of each expert: whoever reports it sets it back to 0
        zeros = torch.zeros(E, dtype=torch.int64)
        self.register_buffer("tokens_per_expert", zeros, persistent=False)
        shared = config.shared_expert_intermediate_size
        self.shared_expert = SwiGLU(config, shared) if shared else None

    def forward(
        self, x: torch.Tensor, balance: tuple[torch.Tensor, int] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x [B, T, D] -> out [B, T, D] and, with `balance` (from `documents`), the load-balancing
        loss of each document [G].
        """
        D = x.shape[-1]
        flat = x.reshape(-1, D)  # N D
        probs = self.gate(flat).float().softmax(-1)  # N E
        weights, chosen = probs.topk(self.top_k, dim=-1)  # N k
        if self.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        order = chosen.flatten().argsort(stable=True)  # N * k places, sorted by expert
        # counted without a wait for the GPU, unlike bincount
        counts = F.one_hot(chosen.flatten(), self.num_experts).sum(0)  # E
        if self.training:
            self.tokens_per_expert += counts
        out = self.experts(flat[order // self.top_k], counts)[order.argsort()]  # in tokens' order
        out = out.view(-1, self.top_k, D) * weights.unsqueeze(-1).type_as(out)  # N k D
        out = out.sum(1).view_as(x)
        if self.shared_expert is not None:
            out = out + self.shared_expert(x)
        return out, None if balance is None else load_balancing_loss(probs, chosen, *balance)


def load_balancing_loss(
    probs: torch.Tensor, chosen: torch.Tensor, doc_ids: torch.Tensor, num_docs: int
) -> torch.Tensor:
    """E * sum_e f_e * P_e of each document [G] (Fedus et al. 2021, eq. 4 to 6); probs [N, E],
    chosen [N, k], doc_ids [N].

    f_e is the fraction of the document's tokens sent to expert e, P_e its mean probability. Per
    document, not per batch: the value does not depend on how documents are packed or how a batch is
    cut into micro-batches.
    """
    E = probs.shape[-1]
    sent = F.one_hot(chosen, E).sum(1).type_as(probs)  # N E
    zeros = probs.new_zeros(num_docs, E)  # G E
    lengths = torch.bincount(doc_ids, minlength=num_docs).clamp(min=1).unsqueeze(-1)
    f, P = (zeros.index_add(0, doc_ids, y) / lengths for y in (sent, probs))
    return E * (f * P).sum(-1)


def documents(
    ids: torch.Tensor, attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None
) -> tuple[torch.Tensor, int]:
    """The document of each token [N], and their number G; the last document is the padding's."""
    B, T = ids.shape
    if position_ids is None or (attention_mask is not None and attention_mask.dim() != 4):
        position_ids = torch.arange(T, device=ids.device)  # not packed
    doc_ids = document_ids(position_ids.expand(B, T))
    num_docs = int(doc_ids[-1]) + 2
    if attention_mask is not None and attention_mask.dim() == 2:
        doc_ids = torch.where(attention_mask[:, -T:].flatten().bool(), doc_ids, num_docs - 1)
    return doc_ids, num_docs


class DecoderLayer(GradientCheckpointingLayer):
    """Attention and feed-forward, each added to the residual stream."""

    def __init__(self, config: MiniMindConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer_idx)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if config.num_experts:
            self.mlp = MixtureOfExperts(config)
        else:
            self.mlp = SwiGLU(config, config.intermediate_size)

    def forward(
        self,
        x: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor | None = None,
        doc_lengths: list[int] | None = None,
        past_key_values: Cache | None = None,
        balance: tuple[torch.Tensor, int] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x [B, T, D] -> x [B, T, D], and the feed-forward's load-balancing losses [G] or None."""
        h = self.input_layernorm(x)
        x = x + self.drop(self.self_attn(h, rope, mask, doc_lengths, past_key_values))
        h, losses = self.post_attention_layernorm(x), None
        if isinstance(self.mlp, MixtureOfExperts):
            h, losses = self.mlp(h, balance)
        else:
            h = self.mlp(h)
        return x + self.drop(h), losses

    def drop(self, branch: torch.Tensor) -> torch.Tensor:
        """Dropout on a branch of the residual stream, in training only (Vaswani et al. 2017,
        section 5.4).
        """
        return F.dropout(branch, self.config.dropout, self.training)


class MiniMindPreTrainedModel(PreTrainedModel):
    """The network's properties for transformers, and its initial weights."""

    config_class = MiniMindConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DecoderLayer"]
    _supports_sdpa = True
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module):
        """Matrices normal with standard deviation `initializer_range`, norms 1."""
        std = self.config.initializer_range
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=std)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, Experts):
            nn.init.normal_(module.gate_up_proj, std=std)
            nn.init.normal_(module.down_proj, std=std)


@dataclass
class MiniMindModelOutput(BaseModelOutputWithPast):
    """Hidden states, cache and, with `balance`, the load-balancing loss of each document [G]."""

    balance_losses: torch.Tensor | None = None


class MiniMindModel(MiniMindPreTrainedModel):
    """The network without its language-model head: token ids -> hidden states."""

    def __init__(self, config: MiniMindConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        layers = (DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool = False,
        balance: tuple[torch.Tensor, int] | None = None,
    ) -> MiniMindModelOutput:
        """ids [B, T] (or inputs_embeds [B, T, D]) -> hidden states [B, T, D].

        balance: from `documents`, to compute the load-balancing losses. The other arguments are
        transformers', hence so many; see MiniMindForCausalLM.forward.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        B, T, _ = x.shape
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        num_past, num_keys = 0, T
        if past_key_values is not None:
            num_past = int(past_key_values.get_seq_length())
            num_keys = past_key_values.get_mask_sizes(T, 0)[0]

        doc_ids = doc_lengths = mask = None
        if position_ids is None:
            position_ids = torch.arange(num_past, num_past + T, device=x.device)[None]
        elif attention_mask is None and past_key_values is None:
            doc_ids = document_ids(position_ids.expand(B, T))
        if doc_ids is not None and x.device.type == "cpu" and not torch.compiler.is_compiling():
            doc_lengths = torch.bincount(doc_ids).tolist()
        else:
            mask = attention_mask_for(attention_mask, doc_ids, (B, T), num_keys, num_past, x.device)

        inv_freq, factor = rope_frequencies(self.config, x.device)
        angles = position_ids[..., None] * inv_freq  # B T d/2
        angles = torch.cat((angles, angles), dim=-1)[:, :, None]  # B T 1 d
        rope = (angles.cos() * factor).type_as(x), (angles.sin() * factor).type_as(x)

        hidden_states, losses = [], []
        for layer in self.layers:
            if output_hidden_states:
                hidden_states.append(x)
            x, layer_losses = layer(x, rope, mask, doc_lengths, past_key_values, balance)
            losses.append(layer_losses)
        x = self.norm(x)
        return MiniMindModelOutput(
            last_hidden_state=x,
            past_key_values=past_key_values,
            hidden_states=(*hidden_states, x) if output_hidden_states else None,
            balance_losses=None if losses[0] is None else torch.stack(losses).mean(0),
        )


class MiniMindForCausalLM(MiniMindPreTrainedModel, GenerationMixin):
    """The language model: hidden states, through the (tied) embedding matrix, to logits."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: MiniMindConfig):
        super().__init__(config)
        self.model = MiniMindModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        head_positions: str | torch.Tensor = "all",
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        output_router_logits: bool = False,
        return_dict: bool = True,
    ) -> MoeCausalLMOutputWithPast | tuple:
        """Next-token logits [B, T, V] and, with labels, the training loss.

        input_ids [B, T], or inputs_embeds [B, T, D]. attention_mask [B, S]: 0 on padding.
        position_ids [B, T]: where they restart (no mask, no cache), a new document begins that does
        not see the one before: packed sequences. labels [B, T]: the ids themselves, -100 where
        nothing is to be learned; shifted here. The loss is the sum of the negative log-likelihoods
        of the targets divided by `num_items_in_batch`, the targets of the whole optimizer step
        (default: of this call), plus for mixtures of experts `router_aux_loss_coef` times the
        documents' balance losses, weighted by their targets.

        head_positions: where the language-model head runs, which decides the parts of the loss:
            "all"      logits everywhere, or at the last `logits_to_keep` positions; the whole loss
            "targets"  only where labels have a target: the whole loss, and no logits
            a mask     bool [B, T]: logits [n, V] at these positions, in row-major order; the loss
                       is the balance losses' part alone, for a stage that writes the rest itself
            "none"     nowhere: the last hidden state [B, T, D] as the only one of `hidden_states`;
                       the loss as with a mask
        The other arguments are those of transformers' causal language models, hence so many.
        """
        if output_attentions:
            raise ValueError(
                "output_attentions: scaled_dot_product_attention does not keep attention weights"
            )
        balance = None
        if self.config.num_experts and (labels is not None or output_router_logits):
            ids = input_ids if input_ids is not None else inputs_embeds[..., 0]
            balance = documents(ids, attention_mask, position_ids)
        inputs = input_ids, attention_mask, position_ids, past_key_values, inputs_embeds
        out = self.model(*inputs, use_cache, output_hidden_states, balance)
        hidden, cache, hidden_states = out.last_hidden_state, out.past_key_values, out.hidden_states
        logits = loss = aux_loss = targets = None
        is_mask = isinstance(head_positions, torch.Tensor)
        if is_mask:
            logits = self.lm_head(hidden[head_positions])  # n V
        elif head_positions == "all":
            logits = self.lm_head(hidden[:, -logits_to_keep:] if logits_to_keep else hidden)
        elif head_positions == "none":
            hidden_states = (hidden,)
        if labels is not None:
            targets = F.pad(labels[:, 1:], (0, 1), value=-100)  # B T
            if num_items_in_batch is None:
                num_items_in_batch = (targets != -100).sum().clamp(min=1)
            loss = hidden.new_zeros(())
            if not is_mask and head_positions != "none":
                loss = self.nll_sum(hidden, targets) / num_items_in_batch
        if balance is not None:
            weights = self.document_weights(*balance, targets)
            aux_loss = (weights * out.balance_losses).sum()
            aux_loss = aux_loss / (weights.sum() if labels is None else num_items_in_batch)
            if labels is not None:
                loss = loss + self.config.router_aux_loss_coef * aux_loss
        output = MoeCausalLMOutputWithPast(loss, aux_loss, logits, cache, hidden_states)
        return output if return_dict is not False else output.to_tuple()

    def nll_sum(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Sum of -log p(target) over targets [B, T] that are not -100; the head runs on those
        positions alone.
        """
        # compiled, a number of positions that changes would compile again in each step
        if not torch.compiler.is_compiling():
            keep = targets != -100
            hidden, targets = hidden[keep], targets[keep]  # n D, n
        logits = self.lm_head(hidden).float().flatten(0, -2)
        return F.cross_entropy(logits, targets.flatten(), ignore_index=-100, reduction="sum")

    @staticmethod
    def document_weights(
        doc_ids: torch.Tensor, num_docs: int, targets: torch.Tensor | None
    ) -> torch.Tensor:
        """Targets of each document [G], or its tokens where there are no labels; padding has 0."""
        counted = torch.ones_like(doc_ids) if targets is None else (targets != -100).flatten()
        weights = torch.bincount(doc_ids, counted.float(), minlength=num_docs)
        weights[-1] = 0
        return weights

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        **unused: object,
    ) -> None:
        """Write a folder of the standard architecture that computes the same function (see
        `native_format`).

        `state_dict` replaces the model's own; the other arguments of transformers' method have no
        effect here.
        """
        if is_main_process:
            write_folder(self, save_directory, state_dict)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *args: object, dtype: torch.dtype | None = None, **kwargs: object
    ) -> "MiniMindForCausalLM":
        """Read a folder written by `save_pretrained`, or any Llama, Qwen3, Qwen3-MoE or
        GraniteMoeShared one that fits.

        Every weight must be there with its shape. dtype: default float32. Raises ValueError.
        """
        if "config" in kwargs:  # transformers calls: trust_remote_code, it loads in its own way
            return super().from_pretrained(folder, *args, dtype=dtype, **kwargs)
        if args or kwargs:
            raise ValueError(
                f"from_pretrained(folder, dtype=...) takes nothing else; got {[*args, *kwargs]}"
            )
        model = cls(MiniMindConfig(**read_config(folder)))
        load_strictly(model, model.read_weights(folder), folder)
        if (Path(folder) / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
        return model.to(dtype or torch.float32).eval()

    def read_weights(self, folder: str | Path) -> dict[str, torch.Tensor]:
        """The state dict of a folder, under our names. ValueError if it is damaged."""
        return read_state(folder, self.config)

    @classmethod
    def from_pth(cls, path: str | Path, **known: object) -> "MiniMindForCausalLM":
        """Read a `.pth` file of this family, of any age. `known`: see `legacy_format.shape_of`."""
        state = read_pickle(path)
        model = cls(MiniMindConfig(**shape_of(state, path, **{**known_beside(path), **known})))
        load_strictly(model, our_names(state, model.config), Path(path))
        return model.eval()


AutoConfig.register("minimind", MiniMindConfig, exist_ok=True)
AutoModelForCausalLM.register(MiniMindConfig, MiniMindForCausalLM, exist_ok=True)

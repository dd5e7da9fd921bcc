"""What a low-rank adapter looks like on disk: the folders of the PEFT library, which transformers, vLLM and others read.

    adapter_config.json          rank, alpha, which layers
    adapter_model.safetensors    base_model.model.LAYER.lora_A.weight [r, in], .lora_B.weight [out, r]
                                 and for DoRA .lora_magnitude_vector [out]

LAYER is a layer's name in transformers' network; here it has the name that it has in ours. Two kinds are special:

- The E experts of a layer lie in one tensor [E, out, in]. PEFT keeps one A [E * r, in] for them, expert after expert, and one
  B [out, r * E], in which neighbouring columns are those of the E experts. It wraps a module once for each of its tensors,
  so with both adapted, what belongs to the inner one, gate_up_proj, is under the name `experts.base_layer`.
- GraniteMoeShared has gate and up of the shared expert as one layer. Two adapters of rank r are written as one of rank 2 r,
  whose A has their rows one below the other, and whose B is block-diagonal: it computes the same.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from .native_format import native_type, replace_file

PREFIX = "base_model.model."
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# what a LoraConfig may ask for that is not built here
UNSUPPORTED = ("modules_to_save", "layer_replication", "megatron_config", "trainable_token_indices", "lora_bias", "use_qalora",
               "use_bdlora", "alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config", "velora_config",
               "fan_in_fan_out")
# values of init_lora_weights (or how they begin) with which PEFT changes the base's weights too
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
EXPERT_WEIGHTS = ("gate_up_proj", "down_proj")  # in PEFT's order, the first one wrapped innermost
GRANITE_NAMES = (
    (".mlp.experts.", ".block_sparse_moe.experts."),
    (".mlp.gate", ".block_sparse_moe.router"),
    (".mlp.shared_expert.down_proj", ".shared_mlp.output_linear"),
)
OURS_SHARED, GRANITE_SHARED = ".mlp.shared_expert.", ".shared_mlp.input_linear"


@dataclass
class LoRASettings:
    """How an adapter is made. `target_modules`: (last parts of) names of layers; None: all linear layers but head and router.

    Raises ValueError for values out of range.
    """

    rank: int = 16
    alpha: float = 32
    dropout: float = 0.0
    target_modules: list[str] | None = None
    use_rslora: bool = False
    use_dora: bool = False

    def __post_init__(self):
        if self.rank < 1 or self.alpha <= 0 or not 0 <= self.dropout < 1:
            raise ValueError(f"rank {self.rank}, alpha {self.alpha}, dropout {self.dropout}: give a rank of 1 or more, an alpha "
                             "above 0, and a dropout from 0 to less than 1")

    @property
    def scale(self):
        return self.alpha / (self.rank**0.5 if self.use_rslora else self.rank)


class Factors(NamedTuple):
    """The adapter of one layer: A [r, in], B [out, r], or with E in front for experts; the scale; for DoRA the lengths [out]."""

    A: torch.Tensor
    B: torch.Tensor
    scale: float
    magnitude: torch.Tensor | None = None


def is_expert_weight(layer):
    """Whether a layer's name is that of a tensor of all experts."""
    return ".experts." in layer


def check_expressible(layers, settings, config):
    """ValueError if PEFT has no format for these layers of a network with these settings."""
    wish = "use_dora" if settings.use_dora else "dropout" if settings.dropout else ""
    if wish and any(map(is_expert_weight, layers)):
        plain = sorted({layer.rpartition(".")[2] for layer in layers if not is_expert_weight(layer)})
        raise ValueError(f"{wish} together with experts, which lie in one tensor for all: PEFT cannot do that. Leave it out, or "
                         f"adapt the other layers only: target_modules {' '.join(plain)}")
    if native_type(config) == "granitemoeshared":
        halves = [{layer.removesuffix(part) for layer in layers if layer.endswith(f"{OURS_SHARED}{part}")}
                  for part in ("gate_proj", "up_proj")]
        if halves[0] != halves[1]:
            raise ValueError("gate_proj and up_proj of the shared expert are one layer in GraniteMoeShared: give both as "
                             "target_modules, or none of them")


# ---- reading


def read_adapter(folder):
    """{name of a layer: Factors} of a PEFT LoRA folder.

    Raises ValueError, naming the file, if it is missing, damaged, of another kind than LoRA, or uses what is not built here.
    """
    path, config = Path(folder) / WEIGHTS, read_adapter_config(folder)
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    layers, unread = {}, set(tensors)
    for stem in sorted(name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")):
        names = [f"{stem}.{part}" for part in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")]
        A, B, magnitude = (tensors.get(name) for name in names)
        layer = layer_of(stem.removeprefix(PREFIX), config)
        rank, alpha = (setting_for(layer, config, *keys) for keys in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")))
        if B is None or len(A) % rank or B.shape[1] != len(A):
            raise ValueError(f"{path}: {stem} has no lora_A and lora_B of rank {rank}, as {CONFIG} says; save the adapter again")
        if (magnitude is not None) != bool(config.get("use_dora")):
            raise ValueError(f"{path}: {stem} has {'no' if magnitude is None else 'a'} lora_magnitude_vector, but use_dora is "
                             f"{config.get('use_dora', False)} in {CONFIG}; save the adapter again")
        scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
        layers |= under_our_names(layer, A, B, rank, scale, magnitude)
        unread -= {*names}
    if unread or not layers:
        raise ValueError(f"{path} holds {min(unread) if unread else 'no lora_A at all'}: only LoRA and DoRA of linear layers, "
                         "and LoRA of experts that lie in one tensor, can be read")
    return layers


def read_adapter_config(folder):
    """adapter_config.json of a PEFT LoRA folder, as a dict. Raises ValueError as `read_adapter` does."""
    path = Path(folder) / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}. Give the folder of a PEFT adapter") from error
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA":
        raise ValueError(f"{path}: peft_type {kind!r} cannot be read; it must be 'LORA'")
    used = [name for name in UNSUPPORTED if config.get(name)] + (["bias"] if config.get("bias", "none") != "none" else [])
    if used:
        raise ValueError(f"{path}: {used[0]} is not supported; merge this adapter with the PEFT library")
    beginning = config.get("init_lora_weights")
    if str(beginning).lower().startswith(CHANGES_BASE):
        raise ValueError(f"{path}: init_lora_weights {beginning!r} has changed the network's weights too, which are not in this "
                         "folder; with the PEFT library merge the adapter, or save it as plain LoRA "
                         "(save_pretrained(..., path_initial_model_for_weight_conversion=...))")
    ranks, alphas = ([config.get(name), *(config.get(pattern) or {}).values()]
                     for name, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")))
    if not all(isinstance(x, int) and x > 0 for x in ranks) or not all(isinstance(x, int | float) and x > 0 for x in alphas):
        raise ValueError(f"{path}: r {ranks[0]!r}, lora_alpha {alphas[0]!r} and those for single layers must be above 0, r a "
                         "whole number; save the adapter again")
    return config


def read_metadata(folder):
    """What the writer noted beside the tensors, a dict of texts."""
    with safe_open(Path(folder) / WEIGHTS, framework="pt") as file:
        return file.metadata() or {}


def layer_of(stem, config):
    """The layer, named as in transformers, that the matrices under a name in the file are for."""
    container = stem.removesuffix(".base_layer")
    if not container.endswith(".experts"):
        return stem
    targets = config.get("target_parameters") or ()
    adapted = [name for name in EXPERT_WEIGHTS if any(f".{container}.{name}".endswith(f".{target}") for target in targets)]
    if not adapted:
        raise ValueError(f"{CONFIG}: target_parameters names no weight of {container}, but the file has an adapter for it")
    return f"{container}.{adapted[-1 if stem == container else 0]}"


def setting_for(layer, config, pattern, default):
    """A rank or alpha: that of the first pattern that a layer's name ends with, or else the one for all."""
    for key, value in (config.get(pattern) or {}).items():
        if re.match(rf"(.*\.)?({key})$", layer):
            return value
    return config[default]


def under_our_names(layer, A, B, rank, scale, magnitude):
    """{our name: Factors} of a layer of transformers' network, whose matrices are as PEFT keeps them."""
    if layer.endswith(GRANITE_SHARED):
        stem, (up, down), count = layer.removesuffix(GRANITE_SHARED) + OURS_SHARED, B.chunk(2), len(A) // 2
        lengths = (None, None) if magnitude is None else magnitude.chunk(2)
        if not up[:, count:].any() and not down[:, :count].any():  # block-diagonal: two adapters of half the rank
            pairs = (A[:count], up[:, :count]), (A[count:], down[:, count:])
        else:
            pairs = (A, up), (A, down)
        return {f"{stem}{name}": Factors(a.contiguous(), b.contiguous(), scale, m)
                for name, (a, b), m in zip(("gate_proj", "up_proj"), pairs, lengths)}
    if is_expert_weight(layer):
        A = A.view(-1, rank, A.shape[1])  # E r in
        B = B.view(len(B), rank, -1).permute(2, 0, 1).contiguous()  # E out r
    for ours, theirs in GRANITE_NAMES:
        layer = layer.replace(theirs, ours)
    return {layer: Factors(A, B, scale, magnitude)}


# ---- writing


def write_adapter(folder, layers, settings, config, base, all_layers, metadata):
    """Write `layers` {our name: Factors}, made with `settings`, as a PEFT folder for the standard architecture of `config`.

    base: where the network is that the adapter belongs to. all_layers: the names of those that could have been adapted.
    metadata: texts to note beside the tensors.
    """
    folder, kind = Path(folder), native_type(config)
    folder.mkdir(parents=True, exist_ok=True)
    layers, patterns = under_native_names(layers, settings, kind)
    tensors = {}
    for layer, (A, B, _, magnitude) in layers.items():
        stem = PREFIX + layer
        if is_expert_weight(layer):
            A, B = A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)  # E*r in, out r*E
            container, _, name = stem.rpartition(".")
            is_inner = name == EXPERT_WEIGHTS[0] and f"{layer.removesuffix(name)}{EXPERT_WEIGHTS[1]}" in layers
            stem = f"{container}.base_layer" if is_inner else container
        tensors |= {f"{stem}.lora_A.weight": A, f"{stem}.lora_B.weight": B}
        if magnitude is not None:
            tensors[f"{stem}.lora_magnitude_vector"] = magnitude
    tensors = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    everything = {native_name(layer, kind) for layer in all_layers}
    experts = {layer for layer in layers if is_expert_weight(layer)}
    alpha = int(settings.alpha) if settings.alpha % 1 == 0 else settings.alpha  # some readers want a whole number
    fields = dict(
        peft_type="LORA", task_type="CAUSAL_LM", base_model_name_or_path=str(base), r=settings.rank, lora_alpha=alpha,
        lora_dropout=settings.dropout, use_rslora=settings.use_rslora, use_dora=settings.use_dora,
        target_modules=short_names(layers.keys() - experts, {layer for layer in everything if not is_expert_weight(layer)}),
        **patterns, bias="none", fan_in_fan_out=False, init_lora_weights=True, inference_mode=True)
    if experts:  # a name that older versions of PEFT do not know
        fields["target_parameters"] = short_names(experts, {layer for layer in everything if is_expert_weight(layer)})
    replace_file(folder / WEIGHTS, lambda path: save_file(tensors, path, metadata={"format": "pt", **metadata}))
    replace_file(folder / CONFIG, lambda path: path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8"))


def native_name(layer, kind):
    """A layer's name in transformers' network of that kind (`native_type`)."""
    if kind != "granitemoeshared":
        return layer
    for ours, theirs in GRANITE_NAMES:
        layer = layer.replace(ours, theirs)
    return re.sub(rf"{re.escape(OURS_SHARED)}(gate|up)_proj$", GRANITE_SHARED, layer)


def under_native_names(layers, settings, kind):
    """`layers` as transformers' network has them, and the {"rank_pattern", "alpha_pattern"} of those that are joined."""
    joined, by_name = {}, {}
    for layer, factors in layers.items():
        by_name.setdefault(native_name(layer, kind), []).append(factors)
    for name, parts in by_name.items():
        A, B, scale, magnitude = parts[0]
        if len(parts) == 2:  # gate, then up
            A, B = torch.cat([part.A for part in parts]), torch.block_diag(*(part.B for part in parts))
            magnitude = None if magnitude is None else torch.cat([part.magnitude for part in parts])
        joined[name] = Factors(A, B, scale, magnitude)
    if not any(name.endswith(GRANITE_SHARED) for name in joined):
        return joined, {"rank_pattern": {}, "alpha_pattern": {}}
    name = GRANITE_SHARED.removeprefix(".")  # twice the rank, but the same scale
    return joined, {"rank_pattern": {name: 2 * settings.rank},
                    "alpha_pattern": {name: settings.alpha * (2**0.5 if settings.use_rslora else 2)}}


def short_names(chosen, everything):
    """The chosen layers by the last part of their names, if no other layer ends like that; else by their whole names."""
    last = {layer.rpartition(".")[2] for layer in chosen}
    is_clear = all(layer in chosen for layer in everything if layer.rpartition(".")[2] in last)
    return sorted(last if is_clear else chosen)

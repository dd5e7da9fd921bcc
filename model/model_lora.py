"""Low-rank adapters (LoRA, Hu et al. 2021; DoRA, Liu et al. 2024) in the format of the PEFT library: reading and merging.

An adapter folder holds `adapter_config.json` and `adapter_model.safetensors`. For a linear layer with weight W [out, in] it
has A [r, in] and B [out, r], and the adapted layer computes with

    W + s B A                 s = alpha / r, with rsLoRA (Kalajdzievski 2023) alpha / sqrt(r)
    m * (W + s B A) / |.|     DoRA: every row (output channel) is brought to a length m [out] that was learned
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

PREFIX = "base_model.model."
UNSUPPORTED = ("modules_to_save", "target_parameters", "layer_replication", "megatron_config", "trainable_token_indices")


@dataclass
class LayerAdapter:
    """The matrices of one linear layer: A [r, in], B [out, r], the scale s, and for DoRA the magnitudes m [out]."""

    A: torch.Tensor
    B: torch.Tensor
    scale: float
    magnitude: torch.Tensor | None = None

    def merged(self, weight):
        """The weight [out, in] that computes what layer and adapter compute together, in float32."""
        merged = weight.float() + self.scale * self.B.float() @ self.A.float()
        if self.magnitude is not None:
            merged = merged * (self.magnitude.float() / merged.norm(dim=1))[:, None]
        return merged


def read_adapter(folder):
    """{name of a linear layer: LayerAdapter} of a PEFT LoRA folder.

    Raises ValueError, naming the file, if it is missing, damaged, of another kind than LoRA, or uses what is not built here.
    """
    folder = Path(folder)
    config = read_adapter_config(folder)
    try:
        tensors = load_file(folder / "adapter_model.safetensors")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{folder / 'adapter_model.safetensors'} cannot be read: {error}") from error
    layers = {}
    for name in sorted(tensors):
        stem, found, _ = name.removeprefix(PREFIX).partition(".lora_A")
        if not found:
            continue
        A, B = (tensors[name.replace("lora_A", part)] for part in ("lora_A", "lora_B"))
        rank, alpha = (setting_for(stem, config, *keys) for keys in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")))
        scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
        magnitudes = [x for other, x in tensors.items() if other.removeprefix(PREFIX).startswith(f"{stem}.lora_magnitude")]
        layers[stem] = LayerAdapter(A, B, scale, *magnitudes)
    unread = [name for name in tensors if not re.search(r"\.lora_(A|B|magnitude_vector)", name)]
    if unread or not layers:
        raise ValueError(f"{folder / 'adapter_model.safetensors'} holds {unread[0] if unread else 'no lora_A at all'}: "
                         "only LoRA and DoRA of linear layers can be read")
    return layers


def read_adapter_config(folder):
    """adapter_config.json of a PEFT LoRA folder, as a dict. Raises ValueError as `read_adapter` does."""
    path = Path(folder) / "adapter_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}. Give the folder of a PEFT adapter") from error
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type {config.get('peft_type')!r} cannot be read; it must be 'LORA'")
    used = [name for name in UNSUPPORTED if config.get(name)] + (["bias"] if config.get("bias", "none") != "none" else [])
    if used:
        raise ValueError(f"{path}: {used[0]} is not supported; merge this adapter with the PEFT library")
    return config


def setting_for(layer, config, pattern, default):
    """A rank or alpha: that of the first pattern that a layer's name ends with, or else the one for all."""
    for key, value in (config.get(pattern) or {}).items():
        if re.match(rf"(.*\.)?({key})$", layer):
            return value
    return config[default]


@torch.no_grad()
def merge_adapter(model, folder):
    """Add a PEFT adapter into the weights of a MiniMindForCausalLM, in place; returns the model.

    Raises ValueError if a layer that the adapter is for is not there or has another shape; then nothing has changed.
    """
    layers = read_adapter(folder)
    modules = dict(model.named_modules())
    for name, adapter in layers.items():
        shape = [len(adapter.B), adapter.A.shape[1]]
        if not isinstance(modules.get(name), nn.Linear):
            raise ValueError(f"{folder}: the network has no linear layer {name}; the adapter is for another one")
        own = list(modules[name].weight.shape)
        if own != shape:
            raise ValueError(f"{folder}: {name} is {own} in the network, {shape} in the adapter; the adapter is for another one")
    for name, adapter in layers.items():
        modules[name].weight.copy_(adapter.merged(modules[name].weight))
    return model

"""A low-rank adapter on disk: the folders of the PEFT library, which transformers, vLLM and others
read.

    adapter_config.json          rank, alpha, which layers
    adapter_model.safetensors    base_model.model.LAYER.lora_A.weight [r, in],
                                 .lora_B.weight [out, r], for DoRA .lora_magnitude_vector [out]

LAYER is a layer's name in transformers' network; in memory it has the name of our network. Two
kinds are special:

- The E experts of a layer lie in one tensor [E, out, in]. PEFT keeps one A [E * r, in] for them,
  expert after expert, and one B [out, r * E], in which neighbouring columns belong to the E
  experts. It wraps a module once for each of its tensors; with both adapted, the inner one,
  gate_up_proj, has the name `experts.base_layer`.
- GraniteMoeShared has gate and up of the shared expert as one layer. Two adapters of rank r are
  written as one of rank 2 r, whose A has their rows one below the other, and whose B is
  block-diagonal: it computes the same.
"""

import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from .files import write_json
from .native_format import native_type, write_tensors

if TYPE_CHECKING:
    from .model_minimind import MiniMindConfig

PREFIX = "base_model.model."
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# options of a LoraConfig that are not built here
UNSUPPORTED = (
    "modules_to_save layer_replication megatron_config trainable_token_indices lora_bias "
    "use_qalora use_bdlora alora_invocation_tokens arrow_config kasa_config monteclora_config "
    "velora_config fan_in_fan_out"
).split()
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
    """How an adapter is made. `target_modules`: (last parts of) names of layers; None: all linear
    layers but head and router.

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
            raise ValueError(
                f"rank {self.rank}, alpha {self.alpha}, dropout {self.dropout}: give a rank of 1 "
                "or more, an alpha above 0, and a dropout from 0 to less than 1"
            )

    @property
    def scale(self) -> float:
        return self.alpha / (self.rank**0.5 if self.use_rslora else self.rank)


class Factors(NamedTuple):
    """The adapter of one layer: A [r, in], B [out, r], or with E in front for experts; the scale;
    for DoRA the lengths [out].
    """

    A: torch.Tensor
    B: torch.Tensor
    scale: float
    magnitude: torch.Tensor | None = None


class Base(NamedTuple):
    """The network that an adapter belongs to: where it is, its shape, the names of all layers that
    could be adapted, and a hash of it without adapter.
    """

    path: str | Path
    config: "MiniMindConfig"
    layers: Collection[str]
    sha256: str


def is_expert_weight(layer: str) -> bool:
    """Whether a layer is a tensor of all experts."""
    return ".experts." in layer


def check_expressible(
    layers: Collection[str], settings: LoRASettings, config: "MiniMindConfig"
) -> None:
    """ValueError if PEFT has no format for these layers of a network with these settings."""
    wish = "use_dora" if settings.use_dora else "dropout" if settings.dropout else ""
    if wish and any(map(is_expert_weight, layers)):
        plain = {last_part(layer) for layer in layers if not is_expert_weight(layer)}
        raise ValueError(
            f"{wish} together with experts, which lie in one tensor for all: PEFT cannot do that. "
            "Leave it out, or adapt the other layers only: target_modules "
            f"{' '.join(sorted(plain))}"
        )
    if native_type(config) == "granitemoeshared":
        gates, ups = (
            {layer.removesuffix(part) for layer in layers if layer.endswith(OURS_SHARED + part)}
            for part in ("gate_proj", "up_proj")
        )
        if gates != ups:
            raise ValueError(
                "gate_proj and up_proj of the shared expert are one layer in GraniteMoeShared: "
                "give both as target_modules, or none of them"
            )


def last_part(layer: str) -> str:
    return layer.rpartition(".")[2]


# ---- reading


def read_adapter(folder: str | Path) -> dict[str, Factors]:
    """The adapters of a PEFT LoRA folder, by the names of their layers.

    Raises ValueError, naming the file, if it is missing, damaged, of another kind than LoRA, or
    uses options that are not built here.
    """
    path, config = Path(folder) / WEIGHTS, read_adapter_config(folder)
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    layers, use_dora = {}, bool(config.get("use_dora"))
    A_names = [name for name in tensors if name.endswith(".lora_A.weight")]
    for stem in sorted(name.removesuffix(".lora_A.weight") for name in A_names):
        A, B, magnitude = (
            tensors.pop(f"{stem}.{part}", None)
            for part in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
        )
        layer = layer_of(stem.removeprefix(PREFIX), config)
        rank = setting_for(layer, config, "rank_pattern", "r")
        alpha = setting_for(layer, config, "alpha_pattern", "lora_alpha")
        if B is None or len(A) % rank or B.shape[1] != len(A):
            raise ValueError(
                f"{path}: {stem} has no lora_A and lora_B of rank {rank}, as {CONFIG} says; save "
                "the adapter again"
            )
        if (magnitude is not None) != use_dora:
            raise ValueError(
                f"{path}: {stem} has {'no' if use_dora else 'a'} lora_magnitude_vector, but "
                f"use_dora is {use_dora} in {CONFIG}; save the adapter again"
            )
        scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
        layers |= under_our_names(layer, Factors(A, B, scale, magnitude), rank)
    if tensors or not layers:
        raise ValueError(
            f"{path} holds {min(tensors) if tensors else 'no lora_A at all'}: only LoRA and DoRA "
            "of linear layers, and LoRA of experts that lie in one tensor, can be read"
        )
    return layers


def read_adapter_config(folder: str | Path) -> dict:
    """adapter_config.json of a PEFT LoRA folder. Raises ValueError as `read_adapter` does."""
    path = Path(folder) / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be read: {error}. Give the folder of a PEFT adapter"
        ) from error
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA":
        raise ValueError(f"{path}: peft_type {kind!r} cannot be read; it must be 'LORA'")
    used = [name for name in UNSUPPORTED if config.get(name)]
    used += ["bias"] if config.get("bias", "none") != "none" else []
    if used:
        raise ValueError(
            f"{path}: {used[0]} is not supported; merge this adapter with the PEFT library"
        )
    beginning = config.get("init_lora_weights")
    if str(beginning).lower().startswith(CHANGES_BASE):
        raise ValueError(
            f"{path}: init_lora_weights {beginning!r} has changed the network's weights too, which "
            "are not in this folder; with the PEFT library merge the adapter, or save it as plain "
            "LoRA (save_pretrained(..., path_initial_model_for_weight_conversion=...))"
        )
    ranks = [config.get("r"), *(config.get("rank_pattern") or {}).values()]
    alphas = [config.get("lora_alpha"), *(config.get("alpha_pattern") or {}).values()]
    if not (
        all(isinstance(x, int) and x > 0 for x in ranks)
        and all(isinstance(x, int | float) and x > 0 for x in alphas)
    ):
        raise ValueError(
            f"{path}: r {ranks[0]!r}, lora_alpha {alphas[0]!r} and those for single layers must be "
            "above 0, r a whole number; save the adapter again"
        )
    return config


def read_metadata(folder: str | Path) -> dict[str, str]:
    """The notes that the writer left in the file of the tensors."""
    with safe_open(Path(folder) / WEIGHTS, framework="pt") as file:
        return file.metadata() or {}


def layer_of(stem: str, config: dict) -> str:
    """The layer, named as in transformers, that the matrices under a name in the file are for."""
    container = stem.removesuffix(".base_layer")
    if not container.endswith(".experts"):
        return stem
    targets = tuple(f".{target}" for target in config.get("target_parameters") or ())
    adapted = [name for name in EXPERT_WEIGHTS if f".{container}.{name}".endswith(targets)]
    if not adapted:
        raise ValueError(
            f"{CONFIG}: target_parameters names no weight of {container}, but the file has an "
            "adapter for it"
        )
    return f"{container}.{adapted[-1 if stem == container else 0]}"


def setting_for(layer: str, config: dict, pattern: str, default: str) -> float:
    """A rank or alpha: of the first pattern that a layer's name ends with, else the one for all."""
    for key, value in (config.get(pattern) or {}).items():
        if re.match(rf"(.*\.)?({key})$", layer):
            return value
    return config[default]


def under_our_names(layer: str, factors: Factors, rank: int) -> dict[str, Factors]:
    """A layer of transformers' network, with matrices as PEFT keeps them, as layers of ours."""
    A, B, scale, magnitude = factors
    if layer.endswith(GRANITE_SHARED):
        stem, half = layer.removesuffix(GRANITE_SHARED) + OURS_SHARED, len(A) // 2
        gate, up = B.chunk(2)
        pairs = (A, gate), (A, up)
        if not gate[:, half:].any() and not up[:, :half].any():  # block-diagonal: two of half rank
            pairs = (A[:half], gate[:, :half]), (A[half:], up[:, half:])
        lengths = (None, None) if magnitude is None else magnitude.chunk(2)
        return {
            f"{stem}{name}": Factors(a.contiguous(), b.contiguous(), scale, m)
            for name, (a, b), m in zip(("gate_proj", "up_proj"), pairs, lengths)
        }
    if is_expert_weight(layer):
        A = A.view(-1, rank, A.shape[1])  # E r in
        B = B.view(len(B), rank, -1).permute(2, 0, 1).contiguous()  # E out r
    for ours, theirs in GRANITE_NAMES:
        layer = layer.replace(theirs, ours)
    return {layer: Factors(A, B, scale, magnitude)}


# ---- writing


def write_adapter(
    folder: str | Path, layers: dict[str, Factors], settings: LoRASettings, base: Base
) -> None:
    """Write `layers`, made with `settings`, as a PEFT folder for `base`'s standard architecture."""
    folder, kind = Path(folder), native_type(base.config)
    folder.mkdir(parents=True, exist_ok=True)
    layers, patterns = under_native_names(layers, settings, kind)
    tensors = {}
    for layer, (A, B, _, magnitude) in layers.items():
        stem = PREFIX + layer
        if is_expert_weight(layer):
            A, B = A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)  # E*r in, out r*E
            inner, outer = (layer.removesuffix(last_part(layer)) + x for x in EXPERT_WEIGHTS)
            stem = stem.rpartition(".")[0]
            stem += ".base_layer" if layer == inner and outer in layers else ""
        tensors |= {f"{stem}.lora_A.weight": A, f"{stem}.lora_B.weight": B}
        if magnitude is not None:
            tensors[f"{stem}.lora_magnitude_vector"] = magnitude
    tensors = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    everything = {native_name(layer, kind) for layer in base.layers}
    all_experts = set(filter(is_expert_weight, everything))
    experts = all_experts & layers.keys()
    # some readers want a whole number
    alpha = int(settings.alpha) if settings.alpha % 1 == 0 else settings.alpha
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base.path),
        "r": settings.rank,
        "lora_alpha": alpha,
        "lora_dropout": settings.dropout,
        "use_rslora": settings.use_rslora,
        "use_dora": settings.use_dora,
        "target_modules": short_names(layers.keys() - experts, everything - all_experts),
        **patterns,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    if experts:  # a name that older versions of PEFT do not know
        fields["target_parameters"] = short_names(experts, all_experts)
    write_tensors(folder / WEIGHTS, tensors, {"base_sha256": base.sha256})
    write_json(folder / CONFIG, fields)


def native_name(layer: str, kind: str) -> str:
    """A layer's name in transformers' network of that kind (`native_type`)."""
    if kind != "granitemoeshared":
        return layer
    for ours, theirs in GRANITE_NAMES:
        layer = layer.replace(ours, theirs)
    return re.sub(rf"{re.escape(OURS_SHARED)}(gate|up)_proj$", GRANITE_SHARED, layer)


def under_native_names(
    layers: dict[str, Factors], settings: LoRASettings, kind: str
) -> tuple[dict[str, Factors], dict[str, dict[str, float]]]:
    """`layers` as transformers has them, and "rank_pattern" and "alpha_pattern" of joined ones."""
    joined, by_name = {}, {}
    for layer, factors in layers.items():
        by_name.setdefault(native_name(layer, kind), []).append(factors)
    for name, parts in by_name.items():
        A, B, scale, magnitude = parts[0]
        if len(parts) == 2:  # gate, then up
            A = torch.cat([part.A for part in parts])
            B = torch.block_diag(*(part.B for part in parts))
            magnitude = None if magnitude is None else torch.cat([part.magnitude for part in parts])
        joined[name] = Factors(A, B, scale, magnitude)
    if not any(name.endswith(GRANITE_SHARED) for name in joined):
        return joined, {"rank_pattern": {}, "alpha_pattern": {}}
    name = GRANITE_SHARED.removeprefix(".")  # twice the rank, but the same scale
    return joined, {
        "rank_pattern": {name: 2 * settings.rank},
        "alpha_pattern": {name: settings.alpha * (2**0.5 if settings.use_rslora else 2)},
    }


def short_names(chosen: Collection[str], everything: Collection[str]) -> list[str]:
    """The last parts of the chosen layers' names; if others end like that, their whole names."""
    last = {last_part(layer) for layer in chosen}
    is_clear = all(layer in chosen for layer in everything if last_part(layer) in last)
    return sorted(last if is_clear else chosen)

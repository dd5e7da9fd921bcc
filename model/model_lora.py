"""Low-rank adapters: LoRA (Hu et al. 2021), rsLoRA (Kalajdzievski 2023) and DoRA (Liu et al. 2024),
trained, combined, merged.

A layer's weight W [out, in] stays as it is. Two small matrices are trained with it, A [r, in] and
B [out, r], and the layer computes with

    W + s B A                         s = alpha / r, with rsLoRA alpha / sqrt(r)
    m * (W + s B A) / |W + s B A|     DoRA: each row (output channel) gets a trained length m [out]

A begins random and B with zeros, so at first nothing is changed. The E experts of a layer have A
[E, r, in] and B [E, out, r].

    add_adapter(model, LoRASettings(rank=8, alpha=16))    # freezes the network; A and B are trained
    load_adapter(model, "out/lora_tiny", "garden")        # one of many; off until it is chosen
    set_adapter(model, {"garden": 1.0, "doctor": 0.5})    # also a name, a list of names, or None
    fold_adapters(model)                                  # merges the active ones into W

On disk an adapter is a folder of the PEFT library: see `adapter_format.py`.
"""

import re
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain, count
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from .adapter_format import (
    CONFIG,
    Base,
    Factors,
    LoRASettings,
    check_expressible,
    last_part,
    read_adapter,
    read_metadata,
    write_adapter,
)
from .legacy_format import lora_factors
from .model_minimind import Experts, expert_linear
from .native_format import network_sha256

Linear = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # x, matrix -> x through the matrix


class LowRank(nn.Module):
    """The adapter of one weight, made of its Factors, which describe the shapes."""

    def __init__(self, factors: Factors, dropout: float = 0.0):
        super().__init__()
        A, B, self.scale, magnitude = factors
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)
        self.magnitude = None if magnitude is None else nn.Parameter(magnitude)
        self.dropout = dropout

    @classmethod
    def new(cls, weight: torch.Tensor, settings: LoRASettings) -> "LowRank":
        """One that changes nothing yet: A is Kaiming-uniform with a = sqrt(5), as in PEFT, that is
        up to 1 / sqrt(in).
        """
        *E, out, width = weight.shape
        A = torch.empty(*E, settings.rank, width, device=weight.device)
        A.uniform_(-(width**-0.5), width**-0.5)
        B = torch.zeros(*E, out, settings.rank, device=weight.device)
        magnitude = weight.detach().float().norm(dim=-1) if settings.use_dora else None
        return cls(Factors(A, B, settings.scale, magnitude), settings.dropout)

    def forward(
        self,
        x: torch.Tensor,
        base: torch.Tensor,
        weight: torch.Tensor,
        coef: float = 1.0,
        linear: Linear = F.linear,
    ) -> torch.Tensor:
        """`coef` times the adapter's change of `base`, the bare layer's output for x."""
        change = linear(linear(F.dropout(x, self.dropout, self.training), self.A), self.B)
        if self.magnitude is None:
            return coef * self.scale * change
        with torch.no_grad():  # a constant for the gradient (section 4.3)
            lengths = self.sum_with(weight).norm(dim=-1)
        out = self.magnitude / lengths * (base + self.scale * change)
        return (coef * (out - base)).type_as(base)

    def sum_with(self, weight: torch.Tensor) -> torch.Tensor:
        """W + s B A, float32."""
        with torch.autocast(weight.device.type, enabled=False):  # would multiply in bfloat16
            return weight.float() + self.scale * (self.B.float() @ self.A.float())

    def merged_with(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight with which a bare layer equals layer and adapter, float32."""
        merged = self.sum_with(weight)
        if self.magnitude is None:
            return merged
        return merged * (self.magnitude.float() / merged.norm(dim=-1))[..., None]


def merged_weight(weight: torch.Tensor, parts: list[tuple[LowRank, float]]) -> torch.Tensor:
    """W plus the changes of adapters, each of the bare W and times its coefficient; float32."""
    base = weight.float()
    return base + sum(coef * (low_rank.merged_with(base) - base) for low_rank, coef in parts)


class Adapted(nn.Module):
    """A layer with adapters: `lora[weight's name][adapter's name]`; `coefs` has the active ones."""

    def adapted(self, name: str, x: torch.Tensor, linear: Linear) -> torch.Tensor:
        """x through the weight of that name and all its active adapters."""
        weight, low_ranks = getattr(self, name), self.lora[name]
        base = out = linear(x, weight)
        for adapter, coef in self.coefs.items():
            if adapter in low_ranks:
                out = out + low_ranks[adapter](x, base, weight, coef, linear)
        return out


class LoRALinear(Adapted, nn.Linear):
    """`nn.Linear` with adapters."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.adapted("weight", x, F.linear)


class LoRAExperts(Adapted, Experts):
    """`Experts` with adapters."""

    def forward(self, x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        linear = partial(expert_linear, counts=counts)
        gate, up = self.adapted("gate_up_proj", x, linear).chunk(2, dim=-1)
        return self.adapted("down_proj", F.silu(gate) * up, linear)


BARE = {LoRALinear: nn.Linear, LoRAExperts: Experts}
ADAPTED = {bare: adapted for adapted, bare in BARE.items()}


# ---- which layers


def adaptable_layers(model: PreTrainedModel) -> dict[str, tuple[nn.Module, str]]:
    """{layer's name: (module, name of its weight)} of all linear layers and experts.

    A head that is tied to the embedding is not among them: an adapter would change both.
    """
    layers, is_tied = {}, model.config.tie_word_embeddings
    for path, module in model.named_modules():
        if isinstance(module, Experts):
            layers |= {f"{path}.{name}": (module, name) for name in ("gate_up_proj", "down_proj")}
        elif isinstance(module, nn.Linear) and not (path == "lm_head" and is_tied):
            layers[path] = module, "weight"
    return layers


def chosen_layers(model: PreTrainedModel, target_modules: list[str] | None) -> list[str]:
    """Names of the layers whose names end with one of these, as whole parts; None: all but the
    head. Routers stay as they are.

    ValueError for a target without a layer.
    """
    layers = [layer for layer in adaptable_layers(model) if not layer.endswith(".mlp.gate")]
    if target_modules is None:
        return [layer for layer in layers if ".layers." in layer]
    for target in target_modules:
        if not any(f".{layer}".endswith(f".{target}") for layer in layers):
            there = dict.fromkeys(map(last_part, layers))
            raise ValueError(
                f"target_modules: the network has no layer {target}; there are {', '.join(there)}"
            )
    endings = tuple(f".{target}" for target in target_modules)
    return [layer for layer in layers if f".{layer}".endswith(endings)]


def read_fitting(model: PreTrainedModel, folder: str | Path) -> dict[str, Factors]:
    """`read_adapter`, and ValueError if the network lacks one of its layers or has another shape.

    Also reads the `.pth` files of this family. A warning if the folder says that it was trained on
    other weights; PEFT's own folders do not say.
    """
    is_pth, layers = Path(folder).suffix == ".pth", adaptable_layers(model)
    if is_pth:
        pairs = lora_factors(folder, model.config.head_dim)
        adapter = {layer: Factors(A, B, 1.0) for layer, (A, B) in pairs.items()}
    else:
        adapter = read_adapter(folder)
    for layer, (A, B, *_) in adapter.items():
        if layer not in layers:
            raise ValueError(
                f"{folder}: the network has no linear layer {layer}; the adapter is for another one"
            )
        own, shape = list(getattr(*layers[layer]).shape), [*B.shape[:-1], A.shape[-1]]
        if own != shape:
            raise ValueError(
                f"{folder}: {layer} is {own} in the network, {shape} in the adapter; the adapter "
                "is for another one"
            )
    trained_on = None if is_pth else read_metadata(folder).get("base_sha256")
    if trained_on and trained_on != network_sha256(model):
        warnings.warn(
            f"{folder} was trained on another network than this (or before others were merged into "
            f"this one): its change may make no sense here. Its own is named in its {CONFIG}",
            stacklevel=3,
        )
    return adapter


# ---- adapters in a network


def is_forbidden(name: str) -> bool:
    """Whether PyTorch has no place for a module of that name in a ModuleDict."""
    return not name or "." in name or hasattr(nn.ModuleDict(), name)


def free_name(model: PreTrainedModel, wish: str) -> str:
    """`wish` as the name of one more adapter: without dots and spaces, "adapter-" before a
    forbidden one, numbered if taken.
    """
    wish = re.sub(r"[.\s]", "_", wish)
    wish = f"adapter-{wish}" if is_forbidden(wish) else wish
    names = chain([wish], (f"{wish}-{number}" for number in count(2)))
    return next(name for name in names if name not in adapter_names(model))


def attach(model: PreTrainedModel, layers: dict[str, LowRank], name: str) -> None:
    """Put an adapter into the layers of these names, which keep their weights under their names."""
    if name in adapter_names(model):
        raise ValueError(f"the network has an adapter {name!r} already: give this one another name")
    if is_forbidden(name):
        raise ValueError(f"an adapter cannot be named {name!r}: give another name, without dots")
    there = adaptable_layers(model)
    for layer, low_rank in layers.items():
        module, weight = there[layer]
        if type(module) in ADAPTED:  # the same object from now on computes in another way
            own = [key for key, _ in module.named_parameters(recurse=False)]
            module.lora = nn.ModuleDict({key: nn.ModuleDict() for key in own})
            module.coefs = {}
            module.__class__ = ADAPTED[type(module)]
        module.lora[weight][name] = low_rank.to(getattr(module, weight)).train(module.training)


def add_adapter(model: PreTrainedModel, settings: LoRASettings, name: str = "default") -> None:
    """Give the network a new adapter, active, and freeze everything else.

    ValueError if a target is unknown, or if PEFT's format has no place for these settings.
    """
    layers = chosen_layers(model, settings.target_modules)
    check_expressible(layers, settings, model.config)
    model.requires_grad_(False)
    there = adaptable_layers(model)
    attach(model, {layer: LowRank.new(getattr(*there[layer]), settings) for layer in layers}, name)
    set_adapter(model, name)


def load_adapter(model: PreTrainedModel, folder: str | Path, name: str) -> None:
    """Give the network the adapter of a PEFT folder, frozen, under a name. It is off until
    `set_adapter` chooses it.

    Raises ValueError as `read_adapter` and `read_fitting` do; then nothing has changed.
    """
    adapter = read_fitting(model, folder)
    parts = {layer: LowRank(factors) for layer, factors in adapter.items()}
    attach(model, {layer: part.requires_grad_(False) for layer, part in parts.items()}, name)


def adapter_names(model: nn.Module) -> list[str]:
    """Names of the network's adapters, in the order in which they came."""
    layers = [module for module in model.modules() if isinstance(module, Adapted)]
    groups = chain.from_iterable(layer.lora.values() for layer in layers)
    return list(dict.fromkeys(chain.from_iterable(groups)))


def set_adapter(model: nn.Module, names: str | Sequence[str] | dict[str, float] | None) -> None:
    """Activate this adapter (a name), the sum of these (a list), a weighted sum ({name:
    coefficient}), or none (None).

    Each adapter changes the bare weight, not another's sum. ValueError for an unknown name.
    """
    names = [] if names is None else [names] if isinstance(names, str) else names
    coefs = dict(names) if isinstance(names, dict) else dict.fromkeys(names, 1.0)
    there = adapter_names(model)
    for name in coefs:
        if name not in there:
            raise ValueError(
                f"there is no adapter {name!r}; there are: {', '.join(there) or 'none'}"
            )
    for module in model.modules():
        if isinstance(module, Adapted):
            module.coefs = dict(coefs)


@torch.no_grad()
def fold_adapters(model: nn.Module) -> nn.Module:
    """Merge the active adapters into the weights in place, make all layers plain; the model."""
    for module in list(model.modules()):
        if isinstance(module, Adapted):
            for name, low_ranks in module.lora.items():
                coefs = {key: coef for key, coef in module.coefs.items() if key in low_ranks}
                if coefs:
                    weight = getattr(module, name)
                    parts = [(low_ranks[key], coef) for key, coef in coefs.items()]
                    weight.copy_(merged_weight(weight, parts))
            module.__class__ = BARE[type(module)]
            del module.lora, module.coefs
    return model


@torch.no_grad()
def merge_adapter(model: PreTrainedModel, *folders: str | Path) -> PreTrainedModel:
    """Merge the adapters of PEFT folders into the weights, in place; returns the model.

    Raises ValueError as `load_adapter` does; then nothing has changed.
    """
    adapters, layers = [read_fitting(model, folder) for folder in folders], adaptable_layers(model)
    for layer in dict.fromkeys(chain.from_iterable(adapters)):
        weight = getattr(*layers[layer])
        factors = [adapter[layer] for adapter in adapters if layer in adapter]
        parts = [(LowRank(one).to(weight.device), 1.0) for one in factors]
        weight.copy_(merged_weight(weight, parts))
    return model


class AdapterOnly:
    """A network with an adapter in training, as a checkpoint wants to see it: only the adapter is
    saved and restored.

    base: where the network comes from, for adapter_config.json. The file also has a hash of the
    network without adapter, so that a run only resumes on the network that it began with.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        settings: LoRASettings,
        base: str | Path,
        name: str = "default",
    ):
        self.model, self.settings, self.base, self.config = model, settings, base, model.config
        self.paths = {}  # layer's name -> its LowRank's
        for layer, (module, weight) in adaptable_layers(model).items():
            if isinstance(module, Adapted) and name in module.lora[weight]:
                self.paths[layer] = f"{layer.removesuffix(f'.{weight}')}.lora.{weight}.{name}"
        self.base_sha256 = network_sha256(model)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """{name in the network: tensor} of all trained parameters."""
        return {
            f"{path}.{part}": x
            for path in self.paths.values()
            for part, x in self.model.get_submodule(path).state_dict().items()
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        for name, x in state.items():
            self.model.get_parameter(name).copy_(x)

    def save_pretrained(
        self, folder: str | Path, state_dict: dict[str, torch.Tensor] | None = None
    ) -> None:
        """Write a PEFT folder."""
        state, scale = state_dict or self.state_dict(), self.settings.scale
        layers = {
            layer: Factors(
                state[f"{path}.A"], state[f"{path}.B"], scale, state.get(f"{path}.magnitude")
            )
            for layer, path in self.paths.items()
        }
        base = Base(self.base, self.config, list(adaptable_layers(self.model)), self.base_sha256)
        write_adapter(folder, layers, self.settings, base)

    def read_weights(self, folder: str | Path) -> dict[str, torch.Tensor]:
        """The state dict of a folder that `save_pretrained` wrote. ValueError if it is damaged or
        for other frozen weights.
        """
        layers = read_adapter(folder)  # shapes are not compared: ranks may split the weights
        if read_metadata(folder).get("base_sha256") != self.base_sha256:
            raise ValueError(
                f"{folder} was trained on another network than {self.base} is now: give the one "
                "that it began with as --from_weight, or start again without --from_resume"
            )
        state = {}
        for layer, factors in layers.items():
            path = self.paths.get(layer, layer)
            state |= {f"{path}.A": factors.A, f"{path}.B": factors.B}
            if factors.magnitude is not None:
                state[f"{path}.magnitude"] = factors.magnitude
        return state

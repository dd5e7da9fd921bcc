"""Low-rank adapters: LoRA (Hu et al. 2021), rsLoRA (Kalajdzievski 2023) and DoRA (Liu et al. 2024), trained, combined, merged.

A layer's weight W [out, in] stays as it is. Two small matrices beside it are trained, A [r, in] and B [out, r], and the
layer computes with

    W + s B A                         s = alpha / r, with rsLoRA alpha / sqrt(r)
    m * (W + s B A) / |W + s B A|     DoRA: each row (output channel) gets a length m [out], which is trained too

A begins random and B with zeros, so at first nothing is changed. The E experts of a layer have A [E, r, in] and B [E, out, r].

    add_adapter(model, LoRASettings(rank=8, alpha=16))          # freezes the network; only A and B are trained
    load_adapter(model, "out/lora_tiny", "garden")              # one of many, by its name; off until it is chosen
    set_adapter(model, {"garden": 1.0, "doctor": 0.5})          # also a name, a list of names, or None
    fold_adapters(model)                                        # W becomes what is switched on; the layers are plain again

On disk an adapter is a folder of the PEFT library: see `adapter_format.py`.
"""

import re
import warnings
from functools import partial
from itertools import chain, count

import torch
import torch.nn.functional as F
from torch import nn

from .adapter_format import CONFIG, Factors, LoRASettings, check_expressible, read_adapter, read_metadata, write_adapter
from .model_minimind import Experts
from .native_format import network_sha256

__all__ = ["AdapterOnly", "LoRASettings", "add_adapter", "fold_adapters", "load_adapter", "merge_adapter", "set_adapter"]


class LowRank(nn.Module):
    """The adapter of one weight: A [r, in], B [out, r], or with E in front for experts; for DoRA the lengths m [out]."""

    def __init__(self, A, B, scale, magnitude=None, dropout=0.0):
        super().__init__()
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)
        self.magnitude = None if magnitude is None else nn.Parameter(magnitude)
        self.scale, self.dropout = scale, dropout

    @classmethod
    def new(cls, weight, settings):
        """One that changes nothing yet: A is Kaiming-uniform with a = sqrt(5), as in PEFT, that is up to 1 / sqrt(in)."""
        *E, out, width = weight.shape
        A = torch.empty(*E, settings.rank, width, device=weight.device).uniform_(-(width**-0.5), width**-0.5)
        B = torch.zeros(*E, out, settings.rank, device=weight.device)
        magnitude = weight.detach().float().norm(dim=-1) if settings.use_dora else None
        return cls(A, B, settings.scale, magnitude, settings.dropout)

    def forward(self, x, base, weight, share=1.0, linear=F.linear):
        """What the adapter adds to `base`, the bare layer's output for x; linear(x, matrix) is how the layer multiplies."""
        change = linear(linear(F.dropout(x, self.dropout, self.training), self.A), self.B)
        if self.magnitude is None:
            return share * self.scale * change
        with torch.no_grad():  # a constant for the gradient (section 4.3)
            lengths = self.sum_with(weight).norm(dim=-1)
        return (share * (self.magnitude / lengths * (base + self.scale * change) - base)).type_as(base)

    def sum_with(self, weight):
        """W + s B A, float32."""
        with torch.autocast(weight.device.type, enabled=False):  # which would multiply in bfloat16
            return weight.float() + self.scale * (self.B.float() @ self.A.float())

    def merged_with(self, weight):
        """The weight with which a bare layer computes what layer and adapter compute, float32."""
        merged = self.sum_with(weight)
        if self.magnitude is None:
            return merged
        return merged * (self.magnitude.float() / merged.norm(dim=-1))[..., None]


def merged_weight(weight, parts):
    """W plus the changes of several adapters, each of the bare W: parts are (LowRank, share); float32."""
    base = weight.float()
    return base + sum(share * (low_rank.merged_with(base) - base) for low_rank, share in parts)


class Adapted(nn.Module):
    """A layer with adapters: `lora[weight's name][adapter's name]`; `shares` says which are on, and how much of each."""

    def adapted(self, name, x, linear):
        """x through the weight of that name and all adapters of it that are on."""
        weight, low_ranks = getattr(self, name), self.lora[name]
        base = out = linear(x, weight)
        for adapter, share in self.shares.items():
            if adapter in low_ranks:
                out = out + low_ranks[adapter](x, base, weight, share, linear)
        return out


class LoRALinear(Adapted, nn.Linear):
    def forward(self, x):
        return self.adapted("weight", x, F.linear)


class LoRAExperts(Adapted, Experts):
    def forward(self, x, counts):
        """x [rows, D] sorted by expert, counts [E] rows of each expert -> [rows, D]."""
        linear = partial(expert_linear, counts=counts)
        gate, up = self.adapted("gate_up_proj", x, linear).chunk(2, dim=-1)
        return self.adapted("down_proj", F.silu(gate) * up, linear)


BARE = {LoRALinear: nn.Linear, LoRAExperts: Experts}
ADAPTED = {bare: adapted for adapted, bare in BARE.items()}


def expert_linear(x, weight, counts):
    """Each row through its expert's matrix: x [rows, in] sorted by expert, weight [E, out, in], counts [E] -> [rows, out]."""
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    fits = not any(size % 8 for size in weight.shape[1:])  # the kernel wants rows of whole 16 bytes
    if x.is_cuda and dtype == torch.bfloat16 and fits:
        return F.grouped_mm(x.to(dtype), weight.to(dtype).mT, offs=counts.cumsum(0).int())
    return torch.cat([F.linear(rows, matrix) for rows, matrix in zip(x.split(counts.tolist()), weight)])


# ---- which layers


def adaptable_layers(model):
    """{layer's name: (module, name of its weight)} of all that can have an adapter: linear layers and experts.

    A head that is tied to the embedding is not among them: it would change both.
    """
    layers = {}
    for path, module in model.named_modules():
        if isinstance(module, Experts):
            layers |= {f"{path}.{name}": (module, name) for name in ("gate_up_proj", "down_proj")}
        elif isinstance(module, nn.Linear) and not (path == "lm_head" and model.config.tie_word_embeddings):
            layers[path] = module, "weight"
    return layers


def chosen_layers(model, target_modules):
    """Names of the layers whose names end with one of these, as whole parts; None: all but the head. Routers stay as they are.

    ValueError for one that fits no layer.
    """
    layers = [layer for layer in adaptable_layers(model) if not layer.endswith(".mlp.gate")]
    if target_modules is None:
        return [layer for layer in layers if ".layers." in layer]
    for target in target_modules:
        if not any(f".{layer}".endswith(f".{target}") for layer in layers):
            there = dict.fromkeys(layer.rpartition(".")[2] for layer in layers)
            raise ValueError(f"target_modules: the network has no layer {target}; there are {', '.join(there)}")
    return [layer for layer in layers if any(f".{layer}".endswith(f".{target}") for target in target_modules)]


def read_fitting(model, folder):
    """`read_adapter`, and ValueError if a layer that the adapter is for is not in the network or has another shape.

    A warning if the folder says that it was trained on other weights; PEFT's own say nothing about that.
    """
    adapter, layers = read_adapter(folder), adaptable_layers(model)
    for layer, factors in adapter.items():
        if layer not in layers:
            raise ValueError(f"{folder}: the network has no linear layer {layer}; the adapter is for another one")
        own, shape = list(getattr(*layers[layer]).shape), [*factors.B.shape[:-1], factors.A.shape[-1]]
        if own != shape:
            raise ValueError(f"{folder}: {layer} is {own} in the network, {shape} in the adapter; the adapter is for another one")
    trained_on = read_metadata(folder).get("base_sha256")
    if trained_on and trained_on != network_sha256(model):
        warnings.warn(f"{folder} was trained on another network than this (or before others were merged into this one): what "
                      f"it adds may make no sense here. Its own is named in its {CONFIG}", stacklevel=3)
    return adapter


# ---- adapters in a network


def is_forbidden(name):
    """Whether PyTorch has no place for a module of that name in a ModuleDict."""
    return not name or "." in name or hasattr(nn.ModuleDict(), name)


def free_name(model, wish):
    """`wish` as the name of one more adapter: without dots and spaces, "adapter-" before a forbidden one, numbered if taken."""
    wish = re.sub(r"[.\s]", "_", wish)
    wish = f"adapter-{wish}" if is_forbidden(wish) else wish
    names = chain([wish], (f"{wish}-{number}" for number in count(2)))
    return next(name for name in names if name not in adapter_names(model))


def attach(model, layers, name):
    """Put an adapter, {layer's name: LowRank}, beside the weights. The layers keep their weights, under their old names."""
    if name in adapter_names(model):
        raise ValueError(f"the network has an adapter {name!r} already: give this one another name")
    if is_forbidden(name):
        raise ValueError(f"an adapter cannot be named {name!r}: give another name, without dots")
    there = adaptable_layers(model)
    for layer, low_rank in layers.items():
        module, weight = there[layer]
        if type(module) in ADAPTED:  # the same object from now on computes in another way
            module.lora = nn.ModuleDict({key: nn.ModuleDict() for key, _ in module.named_parameters(recurse=False)})
            module.shares = {}
            module.__class__ = ADAPTED[type(module)]
        module.lora[weight][name] = low_rank.to(getattr(module, weight)).train(module.training)


def add_adapter(model, settings, name="default"):
    """Give the network a new adapter, switched on, and freeze everything but that.

    ValueError if a target is unknown, or if PEFT's format has no place for what `settings` ask for.
    """
    layers = chosen_layers(model, settings.target_modules)
    check_expressible(layers, settings, model.config)
    model.requires_grad_(False)
    there = adaptable_layers(model)
    attach(model, {layer: LowRank.new(getattr(*there[layer]), settings) for layer in layers}, name)
    set_adapter(model, name)


def load_adapter(model, folder, name):
    """Give the network the adapter of a PEFT folder, frozen, under a name. It is off until `set_adapter` chooses it.

    Raises ValueError as `read_adapter` and `read_fitting` do; then nothing has changed.
    """
    adapter = read_fitting(model, folder)
    attach(model, {layer: LowRank(*factors).requires_grad_(False) for layer, factors in adapter.items()}, name)


def adapter_names(model):
    """Names of the adapters that the network has, in the order in which they came."""
    return list(dict.fromkeys(name for module in model.modules() if isinstance(module, Adapted)
                              for low_ranks in module.lora.values() for name in low_ranks))


def set_adapter(model, names):
    """Switch on this adapter (a name), the sum of these (a list), a weighted sum ({name: share}), or none (None).

    A sum is one of changes: each adapter's is that of the bare weight. ValueError for a name that there is not.
    """
    names = [] if names is None else [names] if isinstance(names, str) else names
    shares = dict(names) if isinstance(names, dict) else dict.fromkeys(names, 1.0)
    for name in shares:
        if name not in adapter_names(model):
            raise ValueError(f"there is no adapter {name!r}; there are: {', '.join(adapter_names(model)) or 'none'}")
    for module in model.modules():
        if isinstance(module, Adapted):
            module.shares = dict(shares)


@torch.no_grad()
def fold_adapters(model):
    """Merge what is switched on into the weights, and make all layers plain again, in place; returns the model."""
    for module in list(model.modules()):
        if isinstance(module, Adapted):
            for name, low_ranks in module.lora.items():
                parts = [(low_ranks[adapter], share) for adapter, share in module.shares.items() if adapter in low_ranks]
                if parts:
                    weight = getattr(module, name)
                    weight.copy_(merged_weight(weight, parts))
            module.__class__ = BARE[type(module)]
            del module.lora, module.shares
    return model


@torch.no_grad()
def merge_adapter(model, *folders):
    """Add the changes that the adapters of PEFT folders make into the weights, in place; returns the model.

    Raises ValueError as `load_adapter` does; then nothing has changed.
    """
    adapters, layers = [read_fitting(model, folder) for folder in folders], adaptable_layers(model)
    for layer in dict.fromkeys(layer for adapter in adapters for layer in adapter):
        weight = getattr(*layers[layer])
        parts = [(LowRank(*adapter[layer]).to(weight.device), 1.0) for adapter in adapters if layer in adapter]
        weight.copy_(merged_weight(weight, parts))
    return model


class AdapterOnly:
    """A network with an adapter in training, as a checkpoint wants to see it: only the adapter is saved and restored.

    base: where the network comes from, for adapter_config.json. A hash of the network without adapter stands in the file, so
    that a run is only gone on with on the network that it began with.
    """

    def __init__(self, model, settings, base, name="default"):
        self.model, self.settings, self.base, self.config = model, settings, base, model.config
        self.paths = {}  # layer's name -> that of its LowRank
        for layer, (module, weight) in adaptable_layers(model).items():
            if isinstance(module, Adapted) and name in module.lora[weight]:
                self.paths[layer] = f"{layer.removesuffix(f'.{weight}')}.lora.{weight}.{name}"
        self.base_sha256 = network_sha256(model)

    def state_dict(self):
        """{name in the network: tensor} of all that is trained."""
        return {f"{path}.{part}": x for path in self.paths.values()
                for part, x in self.model.get_submodule(path).state_dict().items()}

    @torch.no_grad()
    def load_state_dict(self, state):
        for name, x in state.items():
            self.model.get_parameter(name).copy_(x)

    def save_pretrained(self, folder, state_dict=None):
        """Write a PEFT folder."""
        state = state_dict or self.state_dict()
        layers = {layer: Factors(state[f"{path}.A"], state[f"{path}.B"], self.settings.scale, state.get(f"{path}.magnitude"))
                  for layer, path in self.paths.items()}
        write_adapter(folder, layers, self.settings, self.config, self.base, list(adaptable_layers(self.model)),
                      {"base_sha256": self.base_sha256})

    def read_weights(self, folder):
        """The state dict of a folder that `save_pretrained` wrote. ValueError if it is damaged or for other frozen weights."""
        layers = read_adapter(folder)  # whose shapes are not compared here: ranks may share the network's weights
        if read_metadata(folder).get("base_sha256") != self.base_sha256:
            raise ValueError(f"{folder} was trained on another network than {self.base} is now: give the one that it began with "
                             "as --from_weight, or start again without --from_resume")
        state = {}
        for layer, factors in layers.items():
            path = self.paths.get(layer, layer)
            state |= {f"{path}.A": factors.A, f"{path}.B": factors.B}
            if factors.magnitude is not None:
                state[f"{path}.magnitude"] = factors.magnitude
        return state

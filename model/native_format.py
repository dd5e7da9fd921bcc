"""The network on disk: folders of the standard architectures that compute the same function.

| network | written as |
|---|---|
| dense | `llama`; with q/k norm `qwen3` |
| mixture of experts, q/k norm, no shared expert | `qwen3_moe` (one tensor per expert) |
| mixture of experts, no q/k norm, renormalised top-k | `granitemoeshared`, shared expert or not |
| anything else | `minimind`: our own names, and the model's code for `trust_remote_code` |

A reward model (`reward_model.py`) is written as the `...ForSequenceClassification` of the first
three, with one label.

Everything here is a renaming; no number changes. `MiniMindForCausalLM.save_pretrained` and
`.from_pretrained` call it.
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .files import replace_file, write_json
from .legacy_format import is_legacy_config, legacy_fields, modern_names, read_pickle

if TYPE_CHECKING:
    from .model_minimind import MiniMindConfig, MiniMindPreTrainedModel

State = dict[str, torch.Tensor]  # parameter names to tensors

# the code that a folder of our own architecture holds, for trust_remote_code
CODE_FILES = tuple(
    f"{name}.py"
    for name in ("model_minimind", "native_format", "legacy_format", "presets", "files")
)

NATIVE_TYPES = {
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "granitemoeshared": "GraniteMoeSharedForCausalLM",
    "minimind": "MiniMindForCausalLM",
}
SAME_NAME = (
    "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "rms_norm_eps max_position_embeddings tie_word_embeddings initializer_range use_cache "
    "pad_token_id bos_token_id eos_token_id"
).split()
SAME_IN_MOE = (  # of Qwen3-MoE
    "num_experts num_experts_per_tok moe_intermediate_size norm_topk_prob router_aux_loss_coef"
).split()
# factors of GraniteMoeShared that MiniMind does not have
UNSCALED = {"embedding_multiplier": 1.0, "logits_scaling": 1.0, "residual_multiplier": 1.0}
# the only values that MiniMind has for these options of the standard architectures
FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    **UNSCALED,
}
# GraniteMoeShared keeps a layer's experts, and the shared expert's gate and up, in one tensor each
GRANITE_NAMES = (
    (".mlp.gate.weight", ".block_sparse_moe.router.layer.weight"),
    (".mlp.experts.gate_up_proj", ".block_sparse_moe.input_linear.weight"),
    (".mlp.experts.down_proj", ".block_sparse_moe.output_linear.weight"),
    (".mlp.shared_expert.down_proj.weight", ".shared_mlp.output_linear.weight"),
)
GRANITE_SHARED = ".shared_mlp.input_linear.weight"


# ---- the configuration


def native_type(config: "MiniMindConfig") -> str:
    """The `model_type` of the standard architecture, or "minimind" where there is none."""
    if not config.num_experts:
        return "qwen3" if config.qk_norm else "llama"
    if config.qk_norm and not config.shared_expert_intermediate_size:
        return "qwen3_moe"
    # GraniteMoeShared takes the softmax over the chosen logits: renormalised probabilities
    has_default_width = config.head_dim * config.num_attention_heads == config.hidden_size
    if not config.qk_norm and config.norm_topk_prob and has_default_width:
        return "granitemoeshared"
    return "minimind"


def native_config(config: "MiniMindConfig", dtype: torch.dtype) -> dict[str, object]:
    """config.json of the standard architecture; dtype: of the weights."""
    kind, rope = native_type(config), dict(config.rope_parameters)
    fields = {name: getattr(config, name) for name in SAME_NAME} | {
        "model_type": kind,
        "architectures": [NATIVE_TYPES[kind]],
        "dtype": str(dtype).removeprefix("torch."),
        "hidden_act": "silu",
        "intermediate_size": config.intermediate_size,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "rope_parameters": rope,
        "rope_theta": rope["rope_theta"],  # again, for readers from before `rope_parameters`
    }
    if rope["rope_type"] != "default":
        fields["rope_scaling"] = rope
    if kind == "llama":
        fields["mlp_bias"] = False
    elif kind == "qwen3_moe":
        fields |= {name: getattr(config, name) for name in SAME_IN_MOE}
        fields |= {"decoder_sparse_step": 1, "mlp_only_layers": [], "sliding_window": None}
    elif kind == "granitemoeshared":
        fields |= UNSCALED | {
            "num_local_experts": config.num_experts,
            "num_experts_per_tok": config.num_experts_per_tok,
            "intermediate_size": config.moe_intermediate_size,
            "shared_intermediate_size": config.shared_expert_intermediate_size,
            "router_aux_loss_coef": config.router_aux_loss_coef,
            "attention_multiplier": config.head_dim**-0.5,
        }
    return fields


def minimind_fields(native: dict, where: str | Path) -> dict[str, object]:
    """The keyword arguments of MiniMindConfig for a standard config.json.

    Raises ValueError, naming `where`, if MiniMind does not compute that architecture or one of its
    options.
    """
    kind = native.get("model_type")
    if kind not in NATIVE_TYPES:
        raise ValueError(
            f"{where}: model_type {kind!r} cannot be read; it must be one of "
            f"{', '.join(NATIVE_TYPES)}"
        )
    for name, value in FIXED.items():
        if native.get(name, value) not in (value, None):
            raise ValueError(
                f"{where}: {name}={native[name]!r} is not supported; MiniMind computes "
                f"{name}={value!r}"
            )
    fields = {name: native[name] for name in SAME_NAME if name in native}
    if not native.get("head_dim"):
        fields["head_dim"] = native["hidden_size"] // native["num_attention_heads"]
    # transformers' own defaults, for files that leave them out
    fields["tie_word_embeddings"] = native.get("tie_word_embeddings", False)
    rope = dict(native.get("rope_parameters") or native.get("rope_scaling") or {})
    rope["rope_type"] = rope.pop("type", None) or rope.get("rope_type") or "default"
    rope.setdefault("rope_theta", native.get("rope_theta", 10000.0))
    if rope["rope_type"] == "yarn":
        rope.setdefault("original_max_position_embeddings", native["max_position_embeddings"])
    fields |= {
        "rope_parameters": rope,
        "intermediate_size": native["intermediate_size"],
        "qk_norm": kind.startswith("qwen3"),
    }
    if "router_aux_loss_coef" in native:
        fields["router_aux_loss_coef"] = native["router_aux_loss_coef"]
    if kind == "qwen3_moe":
        fields |= {
            "num_experts": native.get("num_experts", native.get("num_local_experts")),
            "num_experts_per_tok": native["num_experts_per_tok"],
            "moe_intermediate_size": native["moe_intermediate_size"],
            "norm_topk_prob": native.get("norm_topk_prob", False),
        }
    elif kind == "granitemoeshared":
        multiplier = fields["head_dim"] ** -0.5
        if abs(native.get("attention_multiplier", 1.0) - multiplier) > 1e-6:
            raise ValueError(
                f"{where}: attention_multiplier must be 1 / sqrt(head_dim) = {multiplier}"
            )
        fields |= {
            "num_experts": native["num_local_experts"],
            "num_experts_per_tok": native["num_experts_per_tok"],
            "shared_expert_intermediate_size": native.get("shared_intermediate_size", 0),
            "norm_topk_prob": True,
        }
    return fields


# ---- the weights' names


def to_native_state(state: State, config: "MiniMindConfig") -> State:
    """Our parameter names -> the standard architecture's; tied tensors left out."""
    kind, state = native_type(config), dict(state)
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    if kind == "qwen3_moe":
        return split_experts(state)
    if kind == "granitemoeshared":
        for name in [name for name in state if name.endswith(".shared_expert.gate_proj.weight")]:
            layer = name.removesuffix(".mlp.shared_expert.gate_proj.weight")
            gate, up = state.pop(name), state.pop(name.replace("gate_proj", "up_proj"))
            state[layer + GRANITE_SHARED] = torch.cat([gate, up])
        for ours, theirs in GRANITE_NAMES:
            state = {name.replace(ours, theirs): x for name, x in state.items()}
    return state


def from_native_state(state: State, num_experts: int = 0) -> State:
    """The names of any standard architecture, or of `modern_names` -> ours."""
    renamed = {}
    for name, x in state.items():
        name = name.replace(".mlp.shared_experts.0.", ".mlp.shared_expert.")
        for ours, theirs in GRANITE_NAMES:
            name = name.replace(theirs, ours)
        renamed[name] = x
    for name in [name for name in renamed if name.endswith(GRANITE_SHARED)]:
        stem = name.removesuffix(GRANITE_SHARED) + ".mlp.shared_expert."
        gate, up = renamed.pop(name).chunk(2)
        renamed |= {f"{stem}gate_proj.weight": gate, f"{stem}up_proj.weight": up}
    return merge_experts(renamed, num_experts)


def split_experts(state: State) -> State:
    """`gate_up_proj` [E, 2F, D] and `down_proj` [E, D, F] -> three matrices per expert."""
    out = {}
    for name, x in state.items():
        stem, _, part = name.rpartition("experts.")
        if part == "gate_up_proj":
            for e, pair in enumerate(x):
                gate, up = pair.chunk(2)
                out[f"{stem}experts.{e}.gate_proj.weight"] = gate.contiguous()
                out[f"{stem}experts.{e}.up_proj.weight"] = up.contiguous()
        elif part == "down_proj":
            for e, matrix in enumerate(x):
                out[f"{stem}experts.{e}.down_proj.weight"] = matrix.contiguous()
        else:
            out[name] = x
    return out


def merge_experts(state: State, num_experts: int) -> State:
    """The way back from `split_experts`; where an expert is missing, `load_strictly` names it."""
    for first in [name for name in state if name.endswith("experts.0.gate_proj.weight")]:
        stem = first.removesuffix("0.gate_proj.weight")
        gates, ups, downs = (
            [f"{stem}{e}.{part}.weight" for e in range(num_experts)]
            for part in ("gate_proj", "up_proj", "down_proj")
        )
        if all(name in state for name in (*gates, *ups, *downs)):
            pairs = [torch.cat([state.pop(gate), state.pop(up)]) for gate, up in zip(gates, ups)]
            state[f"{stem}gate_up_proj"] = torch.stack(pairs)
            state[f"{stem}down_proj"] = torch.stack([state.pop(name) for name in downs])
    return state


# ---- writing


def write_folder(
    model: "MiniMindPreTrainedModel", folder: str | Path, state: State | None = None
) -> None:
    """Write config.json, generation_config.json and model.safetensors of the standard architecture;
    of a reward model, which generates nothing, its sequence classifier with one label.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = to_native_state(state or model.state_dict(), model.config)
    state = {name: x.detach().cpu().contiguous() for name, x in state.items()}
    config = native_config(model.config, next(iter(state.values())).dtype)
    if is_classifier := "score.weight" in state:
        (name,) = config["architectures"]
        config["architectures"] = [name.replace("ForCausalLM", "ForSequenceClassification")]
        config |= {"id2label": {"0": "reward"}, "label2id": {"reward": 0}}
    if config["model_type"] == "minimind":
        config = model.config.to_dict() | {
            "architectures": config["architectures"],
            "dtype": config["dtype"],
            "auto_map": {
                "AutoConfig": "model_minimind.MiniMindConfig",
                "AutoModelForCausalLM": "model_minimind.MiniMindForCausalLM",
            },
        }
        for name in CODE_FILES:
            shutil.copyfile(Path(__file__).with_name(name), folder / name)
    write_tensors(folder / "model.safetensors", state, {})
    write_json(folder / "config.json", config)
    if not is_classifier:
        ends = model.generation_config.eos_token_id
        generation = {"eos_token_id": ends, "pad_token_id": config["pad_token_id"]}
        write_json(folder / "generation_config.json", generation)


def write_tensors(path: Path, tensors: State, metadata: dict[str, str]) -> None:
    """Replace a safetensors file in one move."""
    metadata = {"format": "pt", **metadata}
    replace_file(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))


# ---- reading


def read_config(folder: str | Path) -> dict[str, object]:
    """config.json of a checkpoint folder as the keyword arguments of MiniMindConfig.

    Raises ValueError if there is no such folder or file, or if it is not one of this family.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"{path} is missing: {folder} is not a checkpoint folder")
    try:
        native = json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}); save the checkpoint again") from error
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}:{error.lineno}: not JSON ({error.msg}); the checkpoint is damaged, save it "
            "again"
        ) from error
    if not isinstance(native, dict):
        raise ValueError(f"{path} holds no object, but a {type(native).__name__}")
    if native.get("model_type") != "minimind":
        return minimind_fields(native, path)
    if is_legacy_config(native):
        return legacy_fields(native, path)
    not_ours = ("model_type", "architectures", "auto_map")
    return {name: value for name, value in native.items() if name not in not_ours}


def read_state(folder: str | Path, config: "MiniMindConfig") -> State:
    """All tensors of a folder under our names. ValueError if there are none, or damaged ones."""
    state, files = {}, sorted(Path(folder).glob("*.safetensors"))
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                state |= {name: file.get_tensor(name) for name in file.keys()}
        except SafetensorError as error:
            raise ValueError(
                f"{path} is damaged ({error}); save it again or fall back on an earlier checkpoint"
            ) from error
    if not files:  # what transformers 4 wrote with safe_serialization=False
        files = sorted(Path(folder).glob("pytorch_model*.bin"))
        state = {name: x for path in files for name, x in read_pickle(path).items()}
    if not files:
        raise ValueError(f"{folder} holds no *.safetensors: the checkpoint was never finished")
    return our_names(state, config)


def our_names(state: State, config: "MiniMindConfig") -> State:
    """The tensors of any standard architecture, or of any age of this family, under our names."""
    return from_native_state(modern_names(state, config.head_dim), config.num_experts)


def load_strictly(model: torch.nn.Module, state: State, where: str | Path) -> None:
    """Copy `state` into `model`; ValueError that names the parameters that do not fit."""
    own, tied = model.state_dict(), model.config.tie_word_embeddings
    if tied and "lm_head.weight" in own and "model.embed_tokens.weight" in state:
        state = {**state, "lm_head.weight": state["model.embed_tokens.weight"]}
    if "score.weight" in state and "score.weight" not in own:
        raise ValueError(
            f"{where} is a reward model, which scores a text and cannot write one: give a language "
            "model, such as the one that it began as"
        )
    wrong = [f"{name}: missing" for name in own if name not in state]
    wrong += [f"{name}: not part of this network" for name in state if name not in own]
    for name, x in state.items():
        if name in own and x.shape != own[name].shape:
            shapes = f"{list(x.shape)}, the network has {list(own[name].shape)}"
            wrong.append(f"{name}: shape {shapes}")
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(
            f"{where} does not fit the network ({'; '.join(wrong[:3])}{more}); "
            "give the --preset or the shape that it was trained with"
        )
    model.load_state_dict(state)


def network_sha256(model: torch.nn.Module) -> str:
    """SHA-256, in hex, of all that decides the logits: weights by name, and settings.

    Adapters in it do not count, nor do settings of training alone, such as dropout.
    """
    digest, config = hashlib.sha256(), model.config
    names = ["num_attention_heads", "rms_norm_eps", "rope_parameters"]
    names += ["num_experts_per_tok", "norm_topk_prob"] if config.num_experts else []
    settings = {name: getattr(config, name) for name in names}
    digest.update(json.dumps(settings, sort_keys=True).encode())
    for name, x in model.named_parameters():
        if ".lora." not in name:
            digest.update(f"{name} {list(x.shape)}".encode())
            digest.update(x.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()

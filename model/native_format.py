"""What a checkpoint looks like on disk: the folders of the standard architectures that compute what MiniMind computes.

| network | written as |
|---|---|
| dense | `llama`; with q/k norm `qwen3` |
| mixture of experts with q/k norm, no shared expert | `qwen3_moe` (one tensor per expert) |
| mixture of experts without q/k norm, renormalised top-k, shared expert or not | `granitemoeshared` |
| anything else | `minimind`: our own names, with the model's two files beside them for `trust_remote_code` |

A reward model (`reward_model.py`) is written as the `...ForSequenceClassification` of the first three, with one label.

Everything here is a renaming; no number changes. `MiniMindForCausalLM.save_pretrained` and `.from_pretrained` call it.
"""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

NATIVE_TYPES = {
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "granitemoeshared": "GraniteMoeSharedForCausalLM",
    "minimind": "MiniMindForCausalLM",
}
WITH_CLASSIFIER = ("llama", "qwen3", "qwen3_moe")  # those that have a ...ForSequenceClassification in transformers
SAME_NAME = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings", "initializer_range", "use_cache",
    "pad_token_id", "bos_token_id", "eos_token_id")
# GraniteMoeShared keeps a layer's experts, and the shared expert's gate and up, in one tensor each.
GRANITE_NAMES = (
    (".mlp.gate.weight", ".block_sparse_moe.router.layer.weight"),
    (".mlp.experts.gate_up_proj", ".block_sparse_moe.input_linear.weight"),
    (".mlp.experts.down_proj", ".block_sparse_moe.output_linear.weight"),
    (".mlp.shared_expert.down_proj.weight", ".shared_mlp.output_linear.weight"),
)


def native_type(config):
    """The `model_type` of the standard architecture for a MiniMindConfig, or "minimind" where there is none."""
    if not config.num_experts:
        return "qwen3" if config.qk_norm else "llama"
    if config.qk_norm and not config.shared_expert_intermediate_size:
        return "qwen3_moe"
    # GraniteMoeShared takes the softmax over the chosen logits: the same as renormalised probabilities.
    if not config.qk_norm and config.norm_topk_prob and config.head_dim * config.num_attention_heads == config.hidden_size:
        return "granitemoeshared"
    return "minimind"


def check_classifier(config):
    """ValueError unless transformers has a sequence classifier that computes what a reward model of this shape does."""
    if native_type(config) not in WITH_CLASSIFIER:
        raise ValueError(f"transformers has no sequence classifier of the type {native_type(config)}, so a reward model of "
                         f"this shape could not be saved; it has {', '.join(WITH_CLASSIFIER)}: start from a network without "
                         "shared expert, such as minimind-3 or minimind-3-moe")


def native_config(config, dtype):
    """config.json of the standard architecture, as a dict; dtype: of the weights, e.g. torch.float32."""
    kind, rope = native_type(config), dict(config.rope_parameters)
    fields = {name: getattr(config, name) for name in SAME_NAME}
    fields |= dict(
        model_type=kind, architectures=[NATIVE_TYPES[kind]], dtype=str(dtype).removeprefix("torch."), hidden_act="silu",
        intermediate_size=config.intermediate_size, attention_bias=False, attention_dropout=0.0, rope_parameters=rope,
        rope_theta=rope["rope_theta"])  # once more on its own for readers from before `rope_parameters`
    if rope["rope_type"] != "default":
        fields["rope_scaling"] = rope
    if kind == "llama":
        fields["mlp_bias"] = False
    elif kind == "qwen3_moe":
        fields |= dict(
            num_experts=config.num_experts, num_experts_per_tok=config.num_experts_per_tok, decoder_sparse_step=1,
            moe_intermediate_size=config.moe_intermediate_size, norm_topk_prob=config.norm_topk_prob,
            router_aux_loss_coef=config.router_aux_loss_coef, mlp_only_layers=[], sliding_window=None)
    elif kind == "granitemoeshared":
        fields |= dict(
            num_local_experts=config.num_experts, num_experts_per_tok=config.num_experts_per_tok,
            intermediate_size=config.moe_intermediate_size, router_aux_loss_coef=config.router_aux_loss_coef,
            shared_intermediate_size=config.shared_expert_intermediate_size, attention_multiplier=config.head_dim**-0.5,
            embedding_multiplier=1.0, logits_scaling=1.0, residual_multiplier=1.0)
    return fields


def minimind_fields(native, where):
    """The keyword arguments of MiniMindConfig for a standard config.json (a dict).

    Raises ValueError, naming `where`, if that architecture or one of its options is not what MiniMind computes.
    """
    kind = native.get("model_type")
    if kind not in NATIVE_TYPES:
        raise ValueError(f"{where}: model_type {kind!r} cannot be read; it must be one of {', '.join(NATIVE_TYPES)}")
    fixed = dict(hidden_act="silu", attention_bias=False, mlp_bias=False, use_sliding_window=False,
                 embedding_multiplier=1.0, logits_scaling=1.0, residual_multiplier=1.0, decoder_sparse_step=1)
    for name, value in fixed.items():
        if native.get(name, value) not in (value, None):
            raise ValueError(f"{where}: {name}={native[name]!r} is not supported; MiniMind computes {name}={value!r}")
    fields = {name: native[name] for name in SAME_NAME if name in native}
    if not native.get("head_dim"):
        fields["head_dim"] = native["hidden_size"] // native["num_attention_heads"]
    # transformers' own defaults, for files that leave out what equals them
    fields["tie_word_embeddings"] = native.get("tie_word_embeddings", False)
    rope = dict(native.get("rope_parameters") or native.get("rope_scaling") or {})
    rope["rope_type"] = rope.pop("type", None) or rope.get("rope_type") or "default"
    rope.setdefault("rope_theta", native.get("rope_theta", 10000.0))
    if rope["rope_type"] == "yarn":
        rope.setdefault("original_max_position_embeddings", native["max_position_embeddings"])
    fields |= dict(rope_parameters=rope, intermediate_size=native["intermediate_size"], qk_norm=kind.startswith("qwen3"))
    if kind == "qwen3_moe":
        if native.get("mlp_only_layers"):
            raise ValueError(f"{where}: mlp_only_layers is not supported; every layer must be a mixture of experts")
        fields |= dict(
            num_experts=native.get("num_experts", native.get("num_local_experts")),
            moe_intermediate_size=native["moe_intermediate_size"], num_experts_per_tok=native["num_experts_per_tok"],
            norm_topk_prob=native.get("norm_topk_prob", False))
    elif kind == "granitemoeshared":
        if abs(native.get("attention_multiplier", 1.0) - fields["head_dim"] ** -0.5) > 1e-6:
            raise ValueError(f"{where}: attention_multiplier must be 1 / sqrt(head_dim) = {fields['head_dim'] ** -0.5}")
        fields |= dict(
            num_experts=native["num_local_experts"], norm_topk_prob=True, num_experts_per_tok=native["num_experts_per_tok"],
            shared_expert_intermediate_size=native.get("shared_intermediate_size", 0))
    if "router_aux_loss_coef" in native:
        fields["router_aux_loss_coef"] = native["router_aux_loss_coef"]
    return fields


def to_native_state(state, config):
    """Our parameter names -> the standard architecture's; tied and duplicate tensors left out."""
    state = {name: x for name, x in state.items() if not (config.tie_word_embeddings and name == "lm_head.weight")}
    kind = native_type(config)
    if kind == "qwen3_moe":
        return split_experts(state)
    if kind == "granitemoeshared":
        for name in [name for name in state if name.endswith(".shared_expert.gate_proj.weight")]:
            layer = name.removesuffix(".mlp.shared_expert.gate_proj.weight")
            gate, up = state.pop(name), state.pop(f"{layer}.mlp.shared_expert.up_proj.weight")
            state[f"{layer}.shared_mlp.input_linear.weight"] = torch.cat([gate, up])
        for ours, theirs in GRANITE_NAMES:
            state = {name.replace(ours, theirs): x for name, x in state.items()}
    return state


def from_native_state(state, num_experts=0):
    """The names of any standard architecture of this family -> ours; also of older `.pth` files of this model family."""
    state = {re.sub(r"^(module\.|_orig_mod\.)+", "", name): x for name, x in state.items()}
    state = {name: x for name, x in state.items() if not name.endswith(("freqs_cos", "freqs_sin", "rotary_emb.inv_freq"))}
    state = {name.replace(".mlp.shared_experts.0.", ".mlp.shared_expert."): x for name, x in state.items()}
    for ours, theirs in GRANITE_NAMES:
        state = {name.replace(theirs, ours): x for name, x in state.items()}
    for name in [name for name in state if name.endswith(".shared_mlp.input_linear.weight")]:
        layer = name.removesuffix(".shared_mlp.input_linear.weight")
        gate, up = state.pop(name).chunk(2)
        state[f"{layer}.mlp.shared_expert.gate_proj.weight"], state[f"{layer}.mlp.shared_expert.up_proj.weight"] = gate, up
    return merge_experts(state, num_experts)


def split_experts(state):
    """`experts.gate_up_proj` [E, 2F, D] and `experts.down_proj` [E, D, F] -> three matrices per expert."""
    out = {}
    for name, x in state.items():
        if name.endswith("experts.gate_up_proj"):
            for e, pair in enumerate(x):
                gate, up = pair.chunk(2)
                out[name.replace("gate_up_proj", f"{e}.gate_proj.weight")] = gate.contiguous()
                out[name.replace("gate_up_proj", f"{e}.up_proj.weight")] = up.contiguous()
        elif name.endswith("experts.down_proj"):
            out |= {name.replace("down_proj", f"{e}.down_proj.weight"): x[e].contiguous() for e in range(len(x))}
        else:
            out[name] = x
    return out


def merge_experts(state, num_experts):
    """The way back from `split_experts`; a missing expert is left missing, for the strict load to name."""
    for first in [name for name in state if name.endswith("experts.0.gate_proj.weight")]:
        stem = first.removesuffix("0.gate_proj.weight")
        names = [[f"{stem}{e}.{part}.weight" for part in ("gate_proj", "up_proj", "down_proj")] for e in range(num_experts)]
        if all(name in state for triple in names for name in triple):
            experts = [[state.pop(name) for name in triple] for triple in names]
            state[f"{stem}gate_up_proj"] = torch.stack([torch.cat([gate, up]) for gate, up, _ in experts])
            state[f"{stem}down_proj"] = torch.stack([down for _, _, down in experts])
    return state


def network_sha256(model):
    """SHA-256, in hex, of what decides a network's logits: its weights by name, and what they cannot tell of its shape.

    Adapters in it do not count, nor does what concerns training alone, such as dropout.
    """
    digest, config = hashlib.sha256(), model.config
    names = ["num_attention_heads", "rms_norm_eps", "rope_parameters"]
    names += ["num_experts_per_tok", "norm_topk_prob"] if config.num_experts else []
    digest.update(json.dumps({name: getattr(config, name) for name in names}, sort_keys=True).encode())
    for name, x in model.named_parameters():
        if ".lora." not in name:
            digest.update(f"{name} {list(x.shape)}".encode())
            digest.update(x.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def replace_file(path, write):
    """Call `write(temporary path)`, then put the result in place of `path` in one move: never a half-written file.

    Raises OSError, naming the path, with whatever was there before untouched (a full disk, a missing right).
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)  # safetensors writes for the owner alone
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise OSError(f"could not write {path}: {error}. Free some space or choose another --save_dir; "
                      "what was saved before is untouched") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_folder(model, folder, state=None, is_classifier=False):
    """Write config.json, generation_config.json and model.safetensors of the standard architecture into `folder`.

    is_classifier: it is the architecture's sequence classifier with one label, the reward, which generates nothing.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = to_native_state(state or model.state_dict(), model.config)
    state = {name: x.detach().cpu().contiguous() for name, x in state.items()}
    config = native_config(model.config, next(iter(state.values())).dtype)
    if is_classifier:
        config |= {"architectures": [config["architectures"][0].replace("ForCausalLM", "ForSequenceClassification")],
                   "id2label": {"0": "reward"}, "label2id": {"reward": 0}}
    if config["model_type"] == "minimind":
        config = {**model.config.to_dict(), "architectures": config["architectures"], "dtype": config["dtype"], "auto_map": {
            "AutoConfig": "model_minimind.MiniMindConfig", "AutoModelForCausalLM": "model_minimind.MiniMindForCausalLM"}}
        for name in ("model_minimind.py", "native_format.py"):
            shutil.copyfile(Path(__file__).with_name(name), folder / name)
    replace_file(folder / "model.safetensors", lambda path: save_file(state, path, metadata={"format": "pt"}))
    replace_file(folder / "config.json", lambda path: path.write_text(json.dumps(config, indent=2) + "\n"))
    if is_classifier:
        return
    generation = {"eos_token_id": model.generation_config.eos_token_id, "pad_token_id": config["pad_token_id"]}
    replace_file(folder / "generation_config.json", lambda path: path.write_text(json.dumps(generation, indent=2) + "\n"))


def read_config(folder):
    """config.json of a checkpoint folder as the keyword arguments of MiniMindConfig.

    Raises ValueError if there is no such folder or file, or if it is not one of this family.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"{path} is missing: {folder} is not a checkpoint folder")
    try:
        native = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not JSON ({error.msg}); the checkpoint is damaged, save it again") from error
    if native.get("model_type") == "minimind":
        return {name: value for name, value in native.items() if name not in ("model_type", "architectures", "auto_map")}
    return minimind_fields(native, path)


def read_state(folder, num_experts=0):
    """All tensors of a folder's *.safetensors under our names. Raises ValueError if none, or a damaged one, is there."""
    state, files = {}, sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} holds no *.safetensors: the checkpoint was never finished")
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                state |= {name: file.get_tensor(name) for name in file.keys()}
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}); save it again or fall back on an earlier checkpoint") from error
    return from_native_state(state, num_experts)


def read_pth(path, num_experts=0):
    """A `.pth` state dict of this model family (float16 too) as float32 under our names; never unpickles code."""
    if not Path(path).is_file():
        raise ValueError(f"{path} does not exist")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} is not a PyTorch state dict ({type(error).__name__}: {error})") from error
    state = state.get("model", state) if isinstance(state, dict) else {}
    if not state or not all(isinstance(x, torch.Tensor) for x in state.values()):
        raise ValueError(f"{path} does not hold a state dict (names to tensors)")
    return from_native_state({name: x.float() for name, x in state.items()}, num_experts)


def load_strictly(model, state, where):
    """Copy `state` into `model`; every name and shape must fit, else ValueError that says which do not."""
    own = model.state_dict()
    if "lm_head.weight" in own and model.config.tie_word_embeddings and "model.embed_tokens.weight" in state:
        state = {**state, "lm_head.weight": state["model.embed_tokens.weight"]}
    if "score.weight" in state and "score.weight" not in own:
        raise ValueError(f"{where} is a reward model, which says how good a text is and cannot write one: give a language model, "
                         "such as the one that it began as")
    wrong = [f"{name}: missing" for name in own if name not in state]
    wrong += [f"{name}: not part of this network" for name in state if name not in own]
    wrong += [f"{name}: shape {list(x.shape)}, the network has {list(own[name].shape)}"
              for name, x in state.items() if name in own and x.shape != own[name].shape]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(f"{where} does not fit the network ({'; '.join(wrong[:3])}{more}); "
                         "give the --preset or the shape that it was trained with")
    model.load_state_dict(state)

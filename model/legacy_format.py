"""Checkpoints of jingyaogong/minimind: what each of its ages wrote, under our names.

    2024-08   tok_embeddings, attention.wq, feed_forward.w1; rotary positions in neighbouring pairs,
              theta 1e4, 16 query and 8 key/value heads
    2025-02   the same names and pairs, theta 1e6, 8 and 2 heads
    2025-04   Llama's names and halves; experts in mlp.experts.N, mlp.shared_experts.0
    2026-03   Qwen3's names: q_norm, k_norm; 8 and 4 heads, no shared expert

They are `.pth` files, which hold tensors alone, or folders of its own class: config.json with
`auto_map`, and pytorch_model.bin or model.safetensors. No code in them is run and no pickled object
is made, only tensors.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path

import torch

State = dict[str, torch.Tensor]  # parameter names to tensors

OLD_NAMES = (  # of 2024-08 and 2025-02
    (r"^tok_embeddings\.", "model.embed_tokens."),
    (r"^output\.", "lm_head."),
    (r"^(layers|norm)\.", r"model.\1."),
    (r"\.attention_norm\.", ".input_layernorm."),
    (r"\.ffn_norm\.", ".post_attention_layernorm."),
    (r"\.attention\.w([qkvo])\.", r".self_attn.\1_proj."),
    (r"\.feed_forward\.", ".mlp."),
    (r"\.w1\.", ".gate_proj."),
    (r"\.w2\.", ".down_proj."),
    (r"\.w3\.", ".up_proj."),
    (r"\.shared_experts\.(?!0)", ".shared_experts.0."),
)
UNUSED = ("freqs_cos", "freqs_sin", "pos_cis", "rotary_emb.inv_freq", ".mask")
# keys of its config.json, and what the older ones are called here
SAME = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "intermediate_size", "rms_norm_eps"),
    *("max_position_embeddings", "num_experts", "num_experts_per_tok", "norm_topk_prob"),
    *("moe_intermediate_size", "tie_word_embeddings"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)
RENAMED = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "hidden_dim": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "n_routed_experts": "num_experts",
    "max_seq_len": "max_position_embeddings",
}
# fields of MiniMindConfig that decide the logits, and that no tensor of a `.pth` file tells
NOT_IN_FILE = (
    *("num_attention_heads", "head_dim", "rms_norm_eps", "rope_parameters"),
    *("num_experts_per_tok", "norm_topk_prob"),
)
# the longer contexts of its --inference_rope_scaling
ROPE_SCALING = {
    "rope_type": "yarn",
    "factor": 16.0,
    "original_max_position_embeddings": 2048,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "attention_factor": 1.0,
}


# ---- files


def read_pickle(path: str | Path) -> State:
    """The weights in a `.pth` or `.bin` file in float32, by their names there; unpickles no code.

    Raises ValueError, naming the file, if it is missing or holds anything else.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path} does not exist")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{path} is not a PyTorch state dict ({type(error).__name__}: {error})"
        ) from error
    state = state.get("model", state) if isinstance(state, dict) else {}
    if not state or not all(
        isinstance(name, str) and isinstance(x, torch.Tensor) for name, x in state.items()
    ):
        raise ValueError(f"{path} does not hold a state dict (names to tensors)")
    names = {name: re.sub(r"^(module\.|_orig_mod\.)+", "", name) for name in state}
    return {names[name]: x.float() if x.is_floating_point() else x for name, x in state.items()}


def is_lora(names: Iterable[str]) -> bool:
    """Whether the tensors of these names are an adapter's alone."""
    return all(".lora." in name for name in names)


def beside(path: str | Path) -> Path:
    """The file beside a `.pth` file of ours that says what it does not hold."""
    return Path(path).with_suffix(".json")


def known_beside(path: str | Path) -> dict[str, object]:
    """What that file says, for `shape_of`; {} if there is none, or one about something else.
    ValueError if it is damaged.
    """
    if not (file := beside(path)).is_file():
        return {}
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{file} is damaged ({error}): convert the checkpoint again, or move the file away"
        ) from error
    return known if isinstance(known, dict) and known.keys() == {*NOT_IN_FILE} else {}


# ---- names


def is_interleaved(state: State) -> bool:
    """Whether rotary positions turn neighbouring channels, as before 2025-04."""
    return any(".attention.wq." in name for name in state)


def modern_names(state: State, head_dim: int) -> State:
    """Tensors of any age under the names of Llama and Qwen3; older ones with their channels in the
    order of today's rotary positions. Buffers are left out.
    """
    renamed, old = {}, is_interleaved(state)
    for name, x in state.items():
        if name.endswith(UNUSED):
            continue
        if old and re.search(r"\.attention\.w[qk]\.(lora\.B\.)?weight$", name):
            x = halves_from_pairs(x, head_dim)
        for theirs, ours in OLD_NAMES if old else ():
            name = re.sub(theirs, ours, name)
        renamed[name] = x
    return renamed


def halves_from_pairs(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """The rows of a query or key projection [H d, D] whose rotations turn (0, 1), (2, 3), ... in
    the order in which they turn (0, d/2), (1, d/2 + 1), ...
    """
    heads = weight.unflatten(0, (-1, head_dim // 2, 2))  # H d/2 2 D
    return heads.transpose(1, 2).flatten(0, 2).contiguous()


def lora_factors(path: str | Path, head_dim: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """{layer of ours: (A [r, in], B [out, r])} of an adapter's `.pth` file; a layer's change is
    B A, without a scale. head_dim: of the network. Raises ValueError, naming the file.
    """
    state, factors = modern_names(read_pickle(path), head_dim), {}
    ends = ".lora.A.weight", ".lora.B.weight"
    layers = [name.removesuffix(ends[0]) for name in state if name.endswith(ends[0])]
    for layer in layers:
        factors[layer] = tuple(state.pop(layer + end, None) for end in ends)
    if state or not factors or any(B is None for _, B in factors.values()):
        raise ValueError(
            f"{path} is no LoRA adapter of this family: it holds {next(iter(state), 'no lora.B')}"
        )
    if len({n for A, B in factors.values() for n in (len(A), B.shape[1])}) > 1:
        raise ValueError(f"{path}: the ranks of its layers differ, which cannot be read")
    return factors


# ---- shapes


def shape_of(state: State, where: str | Path, **known: object) -> dict[str, object]:
    """The keyword arguments of MiniMindConfig for a `.pth` file's tensors (of any age).

    known: what the caller says, above all num_attention_heads, which no tensor tells; its default
    is that of the file's age. Raises ValueError, naming `where`, if it is no network of this
    family, or if its number of heads must be said.
    """
    old = is_interleaved(state)
    prefix = "layers.{}.attention.w{}.weight" if old else "model.layers.{}.self_attn.{}_proj.weight"
    embedding = state.get("tok_embeddings.weight" if old else "model.embed_tokens.weight")
    q, k = (state.get(prefix.format(0, one)) for one in "qk")
    if state and is_lora(state):
        raise ValueError(
            f"{where} is a LoRA adapter, a small change to a network, and not a network: give it "
            "as --adapter beside the network that it was trained on"
        )
    if any(x is None or x.dim() != 2 for x in (embedding, q, k)):
        raise ValueError(
            f"{where} is no network of this family: it holds {', '.join(list(state)[:3])}"
        )
    norm = state.get("model.layers.0.self_attn.q_norm.weight")
    heads = known.get("num_attention_heads")
    if norm is not None:
        heads = len(q) // len(norm)
    heads = heads or {(True, 2): 16, (True, 4): 8, (False, 4): 8}.get((old, len(q) // len(k)))
    if not heads or len(q) % heads or len(k) % (len(q) // heads):
        raise ValueError(
            f"{where} does not say how many attention heads it has: convert it with "
            f"python scripts/convert_model.py native {where} --num_attention_heads N --out FOLDER"
        )
    layers = (re.search(r"(?:^|\.)layers\.(\d+)\.", name) for name in state)
    head, tied = state.get("output.weight" if old else "lm_head.weight"), True
    if head is not None:
        tied = torch.equal(head, embedding)
    return {
        "vocab_size": len(embedding),
        "hidden_size": embedding.shape[1],
        "num_hidden_layers": 1 + max(int(match[1]) for match in layers if match),
        "num_attention_heads": heads,
        "num_key_value_heads": len(k) // (len(q) // heads),
        "head_dim": len(q) // heads,
        "qk_norm": norm is not None,
        "tie_word_embeddings": tied,
        "rms_norm_eps": 1e-6 if norm is not None else 1e-5,
        "rope_parameters": {"rope_theta": 1e4 if old and heads == 16 else 1e6},
        **feed_forward_of(state, old),
        **known,
    }


def feed_forward_of(state: State, old: bool) -> dict[str, object]:
    """The part of `shape_of` that is about the feed-forward and its experts."""
    stem, gate = ("layers.0.feed_forward.", "w1") if old else ("model.layers.0.mlp.", "gate_proj")
    if (one := state.get(f"{stem}{gate}.weight")) is not None:
        return {"intermediate_size": len(one)}
    if (joined := state.get(f"{stem}experts.gate_up_proj")) is not None:  # as our class has them
        num_experts, width = len(joined), joined.shape[1] // 2
    else:
        each = rf"{re.escape(stem)}experts\.\d+\.{gate}\.weight"
        gates = [x for name, x in state.items() if re.fullmatch(each, name)]
        num_experts, width = len(gates), len(gates[0]) if gates else 0
    one_for_all = rf"{re.escape(stem)}shared_experts?\.(0\.)?{gate}\.weight"
    shared = [x for name, x in state.items() if re.fullmatch(one_for_all, name)]
    return {
        "intermediate_size": width,
        "num_experts": num_experts,
        # the networks with a shared expert chose two others, and renormalised their weights
        "num_experts_per_tok": 2 if shared else 1,
        "moe_intermediate_size": width,
        "shared_expert_intermediate_size": len(shared[0]) if shared else 0,
        "norm_topk_prob": True,
    }


def is_legacy_config(native: dict) -> bool:
    """Whether a config.json of type "minimind" is theirs: ours has no `use_moe`."""
    return native.get("model_type") == "minimind" and "use_moe" in native


def legacy_fields(native: dict, where: str | Path) -> dict[str, object]:
    """The keyword arguments of MiniMindConfig for a config.json of theirs; ValueError for another
    activation.
    """
    old, shared = "dim" in native, bool(native.get("n_shared_experts"))
    is_qwen = not old and "n_routed_experts" not in native
    fields = {ours: native[theirs] for theirs, ours in RENAMED.items() if theirs in native}
    fields |= {name: native[name] for name in SAME if name in native}
    if not native["use_moe"]:
        fields = {
            name: x for name, x in fields.items() if "expert" not in name and "moe" not in name
        }
    fields = {"qk_norm": is_qwen, "tie_word_embeddings": True} | fields
    width = fields.get("intermediate_size")
    if not width:  # 8/3 of the hidden size, in whole 64s
        width = -(-int(8 * fields["hidden_size"] / 3) // 64) * 64
    fields["intermediate_size"] = width
    fields["num_key_value_heads"] = (
        fields.get("num_key_value_heads") or fields["num_attention_heads"]
    )
    theta = native.get("rope_theta") or (native.get("rope_parameters") or {}).get("rope_theta")
    fields["rope_parameters"] = {"rope_theta": theta or (1e4 if old else 1e6)}
    if native.get("inference_rope_scaling"):
        scaling = {"rope_type": "yarn", **(native.get("rope_scaling") or {})}
        fields["rope_parameters"] |= {
            name: scaling.get(name, default) for name, default in ROPE_SCALING.items()
        }
    if native.get("hidden_act", "silu") != "silu":
        raise ValueError(
            f"{where}: hidden_act={native['hidden_act']!r} is not supported; MiniMind computes "
            "hidden_act='silu'"
        )
    if not native["use_moe"]:
        return fields
    sizes = {} if is_qwen else {"shared_expert_intermediate_size": width if shared else 0}
    return {"num_experts_per_tok": 1 if is_qwen else 2, "norm_topk_prob": True} | fields | sizes

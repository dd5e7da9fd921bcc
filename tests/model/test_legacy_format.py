"""Checkpoints of every age of jingyaogong/minimind, computed here once more by their own rules."""

import json

import pytest
import torch
import torch.nn.functional as F

from model.legacy_format import ROPE_SCALING, read_pickle, shape_of
from model.model_lora import load_adapter, set_adapter
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.native_format import split_experts

V, D, FF, LAYERS = 50, 32, 48, 2
IDS = torch.arange(3, 33).view(2, 15)


def norm(x, weight, eps):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def in_pairs(x, theta):
    """x [B, T, H, d] with the neighbours (0, 1), (2, 3), ... as complex numbers, turned."""
    d, T = x.shape[-1], x.shape[1]
    angles = torch.outer(torch.arange(T), theta ** (-torch.arange(0, d, 2) / d)).double()
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    turned = turned * torch.polar(torch.ones_like(angles), angles)[None, :, None]
    return torch.view_as_real(turned).flatten(-2)


def old_logits(state, heads, kv_heads, theta, eps=1e-5):
    """The network of 2024-08 and 2025-02 in float64: names, pairs, two of the experts."""
    state = {name: x.double() for name, x in state.items()}

    def swiglu(x, stem):
        w1, w2, w3 = (state[f"{stem}w{i}.weight"] for i in (1, 2, 3))
        return (F.silu(x @ w1.T) * (x @ w3.T)) @ w2.T

    def feed_forward(x, stem):
        if f"{stem}gate.weight" not in state:
            return swiglu(x, stem)
        weights, chosen = (x @ state[f"{stem}gate.weight"].T).softmax(-1).topk(2)
        weights = weights / weights.sum(-1, keepdim=True)
        out = swiglu(x, f"{stem}shared_experts.")
        for e in range(4):
            weight = (weights * (chosen == e)).sum(-1, keepdim=True)
            out = out + weight * swiglu(x, f"{stem}experts.{e}.")
        return out

    x = state["tok_embeddings.weight"][IDS]
    B, T = IDS.shape
    for i in range(LAYERS):
        own = f"layers.{i}."
        y = norm(x, state[own + "attention_norm.weight"], eps)
        q, k, v = (y @ state[f"{own}attention.w{one}.weight"].T for one in "qkv")
        q = in_pairs(q.view(B, T, heads, -1), theta)
        k = in_pairs(k.view(B, T, kv_heads, -1), theta)
        k, v = (z.repeat_interleave(heads // kv_heads, 2) for z in (k, v.view(B, T, kv_heads, -1)))
        y = F.scaled_dot_product_attention(*(z.transpose(1, 2) for z in (q, k, v)), is_causal=True)
        x = x + y.transpose(1, 2).flatten(2) @ state[own + "attention.wo.weight"].T
        y = norm(x, state[own + "ffn_norm.weight"], eps)
        x = x + feed_forward(y, own + "feed_forward.")
    return norm(x, state["norm.weight"], eps) @ state["output.weight"].T


def old_state(kv_width, moe=False):
    """Random tensors of 2024-08 (16 and 8 heads) or 2025-02 (8 and 2), by the width of the keys."""
    torch.manual_seed(0)

    def swiglu(stem):
        shapes = {"w1": (FF, D), "w2": (D, FF), "w3": (FF, D)}
        return {f"{stem}{name}.weight": 0.2 * torch.randn(shape) for name, shape in shapes.items()}

    state = {"tok_embeddings.weight": torch.randn(V, D), "norm.weight": 1 + torch.rand(D)}
    state["output.weight"] = state["tok_embeddings.weight"]
    for i in range(LAYERS):
        own = f"layers.{i}."
        for name, width in (("wq", D), ("wk", kv_width), ("wv", kv_width), ("wo", D)):
            state[f"{own}attention.{name}.weight"] = 0.2 * torch.randn(width, D)
        for name in ("attention_norm", "ffn_norm"):
            state[f"{own}{name}.weight"] = 1 + torch.rand(D)
        if moe:
            state[f"{own}feed_forward.gate.weight"] = torch.randn(4, D)
            for one in (*(f"experts.{e}" for e in range(4)), "shared_experts"):
                state |= swiglu(f"{own}feed_forward.{one}.")
        else:
            state |= swiglu(f"{own}feed_forward.")
    return state


AGES = {  # width of the keys -> query heads, key/value heads, theta
    16: (16, 8, 1e4),
    8: (8, 2, 1e6),
}


@pytest.mark.parametrize("moe", [False, True])
@pytest.mark.parametrize("kv_width", AGES)
def test_networks_of_2024_and_early_2025(kv_width, moe, tmp_path):
    state, (heads, kv_heads, theta) = old_state(kv_width, moe), AGES[kv_width]
    torch.save(state, tmp_path / "rl_32.pth")
    model = MiniMindForCausalLM.from_pth(tmp_path / "rl_32.pth")
    expected = old_logits(state, heads, kv_heads, theta)
    torch.testing.assert_close(model(IDS).logits.double(), expected, rtol=1e-4, atol=1e-4)
    assert model.config.num_attention_heads == heads and model.config.intermediate_size == FF

    folder = tmp_path / "folder"  # of its own class, whose code is not there
    folder.mkdir()
    torch.save(state, folder / "pytorch_model.bin")
    config = dict(model_type="minimind", dim=D, n_layers=LAYERS, n_heads=heads, n_kv_heads=kv_heads)
    config |= dict(vocab_size=V, hidden_dim=FF, norm_eps=1e-5, max_seq_len=512, use_moe=moe)
    config |= dict(n_routed_experts=4, n_shared_experts=True, num_experts_per_tok=2)
    config |= dict(rope_theta=theta, auto_map={"AutoModelForCausalLM": "model.MiniMindLM"})
    (folder / "config.json").write_text(json.dumps(config))
    again = MiniMindForCausalLM.from_pretrained(folder)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert again.config.max_position_embeddings == 512


def test_adapters_of_that_time_turn_with_their_layers(tmp_path):
    state = old_state(8)
    torch.save(state, tmp_path / "base.pth")
    lora, changed = {}, dict(state)
    for name in ("layers.0.attention.wq", "layers.1.attention.wo"):
        A, B = torch.randn(4, D), 0.1 * torch.randn(D, 4)
        lora |= {f"module.{name}.lora.A.weight": A.half(), f"module.{name}.lora.B.weight": B.half()}
        changed[f"{name}.weight"] = state[f"{name}.weight"] + B.half().float() @ A.half().float()
    torch.save(lora, tmp_path / "lora.pth")
    model = MiniMindForCausalLM.from_pth(tmp_path / "base.pth")
    load_adapter(model, tmp_path / "lora.pth", "one")
    set_adapter(model, "one")
    expected = old_logits(changed, 8, 2, 1e6)
    torch.testing.assert_close(model(IDS).logits.double(), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"lora.pth is a LoRA adapter, .*give it as --adapter"):
        MiniMindForCausalLM.from_pth(tmp_path / "lora.pth")


@pytest.mark.parametrize("moe", [False, True])
def test_folders_of_2026_say_their_shape(moe, tmp_path):
    shape = dict(hidden_size=D, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2)
    shape |= dict(intermediate_size=FF, vocab_size=V, rms_norm_eps=1e-6)
    experts = dict(num_experts=3, num_experts_per_tok=1, norm_topk_prob=True) if moe else {}
    model = MiniMindForCausalLM(MiniMindConfig(**shape, qk_norm=True, **experts)).eval()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    config = {
        "model_type": "minimind",
        "use_moe": moe,
        "rope_theta": 1e6,
        "num_experts": 3,
        **shape,
    }
    config |= {"num_experts_per_tok": 1, "norm_topk_prob": True, "inference_rope_scaling": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    again = MiniMindForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert again.config.num_experts == (3 if moe else 0)

    (tmp_path / "config.json").write_text(json.dumps({**config, "inference_rope_scaling": True}))
    stretched = MiniMindForCausalLM.from_pretrained(tmp_path).config.rope_parameters
    assert stretched == {"rope_theta": 1e6, **ROPE_SCALING}


@pytest.mark.parametrize("moe", [False, True])
def test_folders_of_2025_04_say_their_shape(moe, tmp_path):
    """Llama's names, its own keys for the experts, and no q/k norm."""
    shape = dict(hidden_size=D, num_hidden_layers=1, num_attention_heads=8, num_key_value_heads=2)
    shape |= dict(intermediate_size=FF, vocab_size=V, rms_norm_eps=1e-5)
    experts = dict(num_experts=4, num_experts_per_tok=2, norm_topk_prob=True) if moe else {}
    experts |= dict(shared_expert_intermediate_size=FF) if moe else {}
    torch.manual_seed(0)
    model = MiniMindForCausalLM(MiniMindConfig(**shape, **experts)).eval()
    state = {
        name.replace(".shared_expert.", ".shared_experts.0."): x
        for name, x in split_experts(model.state_dict()).items()
    }
    torch.save(state, tmp_path / "pytorch_model.bin")
    config = {"model_type": "minimind", "use_moe": moe, "rope_theta": 1e6, **shape}
    config |= dict(n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2)
    (tmp_path / "config.json").write_text(json.dumps(config))
    again = MiniMindForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(IDS).logits, model(IDS).logits) and not again.config.qk_norm
    torch.save(state, tmp_path / "one.pth")
    assert torch.equal(
        MiniMindForCausalLM.from_pth(tmp_path / "one.pth")(IDS).logits, model(IDS).logits
    )


def test_heads_that_no_tensor_tells_must_be_said(tmp_path):
    state = old_state(32)  # as many key heads as query heads: no age had that
    torch.save(state, tmp_path / "fork.pth")
    with pytest.raises(ValueError, match=r"how many attention heads.*--num_attention_heads N"):
        MiniMindForCausalLM.from_pth(tmp_path / "fork.pth")
    rope = {"rope_theta": 1e4}
    model = MiniMindForCausalLM.from_pth(
        tmp_path / "fork.pth", num_attention_heads=4, rope_parameters=rope
    )
    expected = old_logits(state, 4, 4, 1e4)
    torch.testing.assert_close(model(IDS).logits.double(), expected, rtol=1e-4, atol=1e-4)


def test_code_in_a_file_is_never_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").touch, ())

    torch.save({"tok_embeddings.weight": Trap()}, tmp_path / "trap.pth")
    with pytest.raises(ValueError, match="is not a PyTorch state dict"):
        read_pickle(tmp_path / "trap.pth")
    assert not (tmp_path / "ran").exists()


def test_another_family_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"x.pth is no network of this family: it holds a.weight"):
        shape_of({"a.weight": torch.zeros(2)}, "x.pth")

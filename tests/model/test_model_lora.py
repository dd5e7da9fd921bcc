"""Adapters that the PEFT library wrote are read, and merged they compute what PEFT computes."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model

from model.model_lora import merge_adapter, read_adapter
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def network(seed=0):
    torch.manual_seed(seed)
    return MiniMindForCausalLM(MiniMindConfig.from_preset("tiny", num_hidden_layers=2)).eval()


def adapted(folder, **options):
    """Save a random PEFT adapter of `network()` and return the logits that PEFT computes with it."""
    torch.manual_seed(1)
    peft = get_peft_model(network(), LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ALL, **options})).eval()
    with torch.no_grad():
        for name, x in peft.named_parameters():
            if "lora_" in name:
                x.add_(torch.randn_like(x) * 0.1)
    peft.save_pretrained(folder)
    return peft(ids()).logits


def ids():
    return torch.arange(20, 60).view(2, 20)


@pytest.mark.parametrize("options", [
    {}, {"use_rslora": True}, {"use_dora": True}, {"use_dora": True, "use_rslora": True},
    {"target_modules": ["q_proj", "v_proj"]}, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.up_proj": 32}}])
def test_a_merged_adapter_computes_what_peft_computes(tmp_path, options):
    expected = adapted(tmp_path, **options)
    merged = merge_adapter(network(), tmp_path)
    torch.testing.assert_close(merged(ids()).logits, expected, rtol=1e-4, atol=1e-5)
    assert (merged(ids()).logits - network()(ids()).logits).abs().max() > 0.01


def test_an_adapter_for_another_network_changes_nothing(tmp_path):
    adapted(tmp_path)
    other = MiniMindForCausalLM(MiniMindConfig.from_preset("tiny", num_hidden_layers=1))
    before = {name: x.clone() for name, x in other.state_dict().items()}
    with pytest.raises(ValueError, match=r"no linear layer model\.layers\.1"):
        merge_adapter(other, tmp_path)
    assert all(torch.equal(x, before[name]) for name, x in other.state_dict().items())
    with pytest.raises(ValueError, match=r"down_proj is \[.*\] in the network"):
        merge_adapter(MiniMindForCausalLM(MiniMindConfig.from_preset("tiny", hidden_size=64, num_hidden_layers=2)), tmp_path)


def test_faulty_folders_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"adapter_config\.json cannot be read"):
        read_adapter(tmp_path)
    adapted(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for change, message in (({"peft_type": "IA3"}, "peft_type 'IA3'"), ({"bias": "all"}, "bias is not supported"),
                            ({"modules_to_save": ["lm_head"]}, "modules_to_save is not supported")):
        (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ValueError, match=message):
            read_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors cannot be read"):
        read_adapter(tmp_path)

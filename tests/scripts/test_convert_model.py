"""Checkpoints of other ages become folders that transformers reads, and go back."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from model.model_minimind import MiniMindForCausalLM
from scripts.convert_model import main
from tests.helpers.networks import build, token_ids
from tests.helpers.other_tokenizer import trained_network, write_other_tokenizer

ROOT = Path(__file__).resolve().parents[2]
IDS = torch.arange(40, 80).view(2, 20)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """(a .pth file of a trained network, the folder of its tokenizer, which is not ours)."""
    folder = tmp_path_factory.mktemp("theirs")
    tokenizer = write_other_tokenizer(folder / "model")
    (folder / "out").mkdir()
    path = folder / "out" / "full_sft_64.pth"
    torch.save(trained_network(tokenizer).state_dict(), path)
    return path, tokenizer


def test_there_and_back_no_logit_changes(theirs, tmp_path, capsys):
    path, tokenizer = theirs
    main(["native", str(path), "--out", str(tmp_path / "native")])
    said = capsys.readouterr().out.strip().splitlines()[-1]
    assert "full_sft_64.pth as Qwen3ForCausalLM, 64x1" in said
    assert "logits before and after: at most 0.0e+00 apart" in said and "in transformers" in said
    before = MiniMindForCausalLM.from_pth(path)(IDS).logits
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "native")
    torch.testing.assert_close(again(IDS).logits, before, rtol=1e-5, atol=1e-5)
    vocabulary = AutoTokenizer.from_pretrained(tokenizer).get_vocab()
    assert AutoTokenizer.from_pretrained(tmp_path / "native").get_vocab() == vocabulary

    main(["pth", str(tmp_path / "native"), "--out", str(tmp_path / "back_64.pth")])
    said = capsys.readouterr().out
    assert "MiniMindConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=4" in said
    assert said.strip().endswith("logits before and after: at most 0.0e+00 apart")
    first, last = (torch.load(x, weights_only=True) for x in (path, tmp_path / "back_64.pth"))
    assert first.keys() == last.keys()
    assert all(torch.equal(first[name], last[name]) for name in first)
    beside = tmp_path / "back_64_tokenizer"
    assert AutoTokenizer.from_pretrained(beside).get_vocab() == vocabulary


@pytest.mark.parametrize(
    "kind", ["llama", "qwen3", "qwen3_moe", "qwen3_moe_top2", "granitemoeshared"]
)
def test_every_shape_of_that_family_goes_to_a_pth_file(kind, tmp_path, capsys):
    model = build(kind, vocab_size=6400).eval()
    model.save_pretrained(tmp_path / "one")
    AutoTokenizer.from_pretrained(ROOT / "model").save_pretrained(tmp_path / "one")
    main(["pth", str(tmp_path / "one"), "--out", str(tmp_path / "one.pth")])
    assert "at most 0.0e+00 apart" in capsys.readouterr().out
    again = MiniMindForCausalLM.from_pth(tmp_path / "one.pth")
    assert torch.equal(again(token_ids()).logits, model(token_ids()).logits)
    names = torch.load(tmp_path / "one.pth", weights_only=True)
    if kind == "granitemoeshared":
        assert "model.layers.0.mlp.shared_experts.0.gate_proj.weight" in names
        assert "model.layers.1.mlp.experts.3.down_proj.weight" in names


def test_a_json_file_about_something_else_is_passed_over(theirs, tmp_path):
    path = tmp_path / "full_sft_64.pth"
    path.write_bytes(theirs[0].read_bytes())
    expected = MiniMindForCausalLM.from_pth(path)(IDS).logits
    (tmp_path / "full_sft_64.json").write_text('{"rms_norm_eps": 1.0, "loss": 2}')
    assert torch.equal(MiniMindForCausalLM.from_pth(path)(IDS).logits, expected)
    (tmp_path / "full_sft_64.json").write_text('{"rms_norm_eps": ')
    with pytest.raises(ValueError, match=r"full_sft_64\.json is damaged .*move the file away"):
        MiniMindForCausalLM.from_pth(path)


def test_an_adapter_becomes_a_folder_of_peft(theirs, tmp_path, capsys):
    from peft import PeftModel

    path, _ = theirs
    A, B = torch.randn(4, 64), 0.1 * torch.randn(64, 4)
    layer = "model.layers.0.self_attn.o_proj"
    lora = {f"{layer}.lora.A.weight": A, f"{layer}.lora.B.weight": B}
    torch.save(lora, tmp_path / "lora_identity_64.pth")
    out = tmp_path / "lora_identity"
    flags = ["native", str(tmp_path / "lora_identity_64.pth"), "--out", str(out)]
    with pytest.raises(ValueError, match=r"is a LoRA adapter: give the network .*--from_weight"):
        main(flags)
    main([*flags, "--from_weight", str(path)])
    assert "rank 4, 1 layers of full_sft_64.pth" in capsys.readouterr().out

    main(["native", str(path), "--out", str(tmp_path / "base")])
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    merged = PeftModel.from_pretrained(base, out).merge_and_unload()
    plain = MiniMindForCausalLM.from_pth(path)
    plain.get_submodule(layer).weight.data += B @ A
    torch.testing.assert_close(merged(IDS).logits, plain(IDS).logits, rtol=1e-5, atol=1e-5)

    main(
        ["merge", "--from_weight", str(path), "--adapter", str(tmp_path / "lora_identity_64.pth")]
        + ["--out", str(tmp_path / "merged")]
    )
    after = MiniMindForCausalLM.from_pretrained(tmp_path / "merged")(IDS).logits
    torch.testing.assert_close(after, plain(IDS).logits, rtol=1e-5, atol=1e-5)


def test_results_are_not_replaced_by_accident(theirs, tmp_path):
    path, _ = theirs
    flags = ["native", str(path), "--out", str(tmp_path / "a")]
    main(flags)
    with pytest.raises(ValueError, match=r"is there already: .*\(--overwrite\)"):
        main(flags)
    main([*flags, "--overwrite"])
    record = json.loads((tmp_path / "a" / "converted.json").read_text("utf-8"))
    assert list(record["sha256"]) == ["full_sft_64.pth"]
    (tmp_path / "b").mkdir()
    with pytest.raises(ValueError, match=r"holds no converted\.json"):
        main(["native", str(path), "--out", str(tmp_path / "b"), "--overwrite"])


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "which command, native, pth, merge? For example: python scripts/convert_model.py"),
        (["nativ"], "invalid choice: 'nativ'"),
        (["native"], "the following arguments are required: source"),
        (["native", "x.pth"], "--out is missing"),
        (
            ["native", "x", "--out", "y", "--rope_theta", "1e4"],
            "--rope_theta: only for a .pth file",
        ),
        (["pth", "x", "--out", "y"], "--out 'y': give a name that ends in .pth"),
    ],
)
def test_mistakes_are_named_before_anything_is_read(argv, message, capsys):
    with pytest.raises(SystemExit):
        main(argv)
    assert message in capsys.readouterr().err

"""Adapters become part of a network, once."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from model.model_lora import AdapterOnly, LoRASettings, add_adapter, load_adapter, set_adapter
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from scripts import convert_model

ROOT = Path(__file__).resolve().parents[2]
SHAPE = dict(
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    intermediate_size=16,
)
MOE = dict(num_experts=2, num_experts_per_tok=1, qk_norm=True)


def main(argv):
    convert_model.main(["merge", *argv])


def ids():
    return torch.arange(20, 40).view(2, 10)


def save_base(folder, template=True, **shape):
    torch.manual_seed(0)
    MiniMindForCausalLM(MiniMindConfig(**SHAPE, **shape)).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "model")
    tokenizer.chat_template = tokenizer.chat_template if template else None
    tokenizer.save_pretrained(folder)


def save_adapter(folder, base, seed, **options):
    model, settings = MiniMindForCausalLM.from_pretrained(base), LoRASettings(rank=2, **options)
    torch.manual_seed(seed)
    add_adapter(model, settings)
    with torch.no_grad():
        for x in model.parameters():
            if x.requires_grad:
                x.add_(torch.randn_like(x) * 0.1)
    AdapterOnly(model, settings, base).save_pretrained(folder)


def unmerged(base, *adapters):
    """Logits of the base with these adapters beside it."""
    model = MiniMindForCausalLM.from_pretrained(base)
    for number, folder in enumerate(adapters):
        load_adapter(model, folder, f"{number}")
    set_adapter(model, [f"{number}" for number in range(len(adapters))])
    with torch.no_grad():
        return model(ids()).logits


def logits(folder):
    with torch.no_grad():
        return MiniMindForCausalLM.from_pretrained(folder)(ids()).logits


@pytest.fixture
def out(tmp_path):
    """A save folder with a chat network and two adapters."""
    save_base(tmp_path / "out" / "full_sft_16x1")
    for seed, name in enumerate(("a", "b")):
        save_adapter(tmp_path / "out" / name, tmp_path / "out" / "full_sft_16x1", seed)
    return tmp_path / "out"


@pytest.mark.parametrize(
    "shape, options", [({}, {}), ({}, {"use_dora": True, "use_rslora": True}), (MOE, {})]
)
def test_merged_is_unmerged_and_a_folder_like_any_other(shape, options, tmp_path):
    base, adapter, out = (tmp_path / name for name in ("base", "adapter", "merged"))
    save_base(base, **shape)
    save_adapter(adapter, base, 1, **options)
    main(["--from_weight", str(base), "--adapter", str(adapter), "--out", str(out)])
    torch.testing.assert_close(logits(out), unmerged(base, adapter), rtol=1e-4, atol=1e-5)
    assert (logits(out) - logits(base)).abs().max() > 0.001
    theirs = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), adapter
    ).merge_and_unload()
    ours = AutoModelForCausalLM.from_pretrained(out)
    torch.testing.assert_close(ours(ids()).logits, theirs(ids()).logits, rtol=1e-4, atol=1e-5)
    assert ours.generation_config.eos_token_id == [2, 0]
    assert (
        AutoTokenizer.from_pretrained(out).chat_template
        == AutoTokenizer.from_pretrained(base).chat_template
    )


def test_several_are_added_at_once_or_one_after_the_other_and_none_twice(out, capsys):
    common = ["--save_dir", str(out)]
    main(
        [
            *common,
            "--from_weight",
            "full_sft",
            "--adapter",
            str(out / "a"),
            str(out / "b"),
            str(out / "a"),
        ]
    )
    assert "a is given twice: it is added once" in capsys.readouterr().out
    both = unmerged(out / "full_sft_16x1", out / "a", out / "b")
    torch.testing.assert_close(logits(out / "merged_16x1"), both, rtol=1e-4, atol=1e-5)
    record = json.loads((out / "merged_16x1" / "merged_adapters.json").read_text())
    assert [Path(one["folder"]).name for one in record["adapters"]] == ["a", "b"]

    main([*common, "--adapter", str(out / "a"), "--out", str(out / "one")])
    main(
        [
            *common,
            "--from_weight",
            str(out / "one"),
            "--adapter",
            str(out / "a"),
            str(out / "b"),
            "--out",
            str(out / "two"),
        ]
    )
    assert (
        f"{out / 'a'} is in {out / 'one'} already: it is not added again" in capsys.readouterr().out
    )
    torch.testing.assert_close(logits(out / "two"), both, rtol=1e-4, atol=1e-5)


def test_the_same_command_again_does_nothing(out, capsys):
    command = ["--save_dir", str(out), "--adapter", str(out / "a"), "--out", str(out / "merged")]
    main(command)
    before = {path: path.stat().st_mtime_ns for path in (out / "merged").iterdir()}
    main(command)
    main([*command, "--overwrite"])
    main(
        [
            "--save_dir",
            str(out),
            "--from_weight",
            str(out / "merged"),
            "--adapter",
            str(out / "a"),
            "--out",
            str(out / "again"),
        ]
    )
    said = capsys.readouterr().out
    assert said.count("is that already: nothing to do") == 2 and "a is in" in said
    assert (
        before == {path: path.stat().st_mtime_ns for path in (out / "merged").iterdir()}
        and not (out / "again").exists()
    )


def test_a_folder_that_is_there_is_replaced_only_on_demand(out):
    command = ["--save_dir", str(out), "--out", str(out / "merged"), "--adapter"]
    main([*command, str(out / "a")])
    with pytest.raises(ValueError, match=r"merged is there already.*--overwrite"):
        main([*command, str(out / "b")])
    torch.testing.assert_close(
        logits(out / "merged"), unmerged(out / "full_sft_16x1", out / "a"), rtol=1e-4, atol=1e-5
    )
    main([*command, str(out / "b"), "--overwrite"])
    torch.testing.assert_close(
        logits(out / "merged"), unmerged(out / "full_sft_16x1", out / "b"), rtol=1e-4, atol=1e-5
    )
    assert not [path for path in out.iterdir() if path.name.startswith(".merged")]
    (out / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match="is the folder of a training run"):
        main(
            [
                "--save_dir",
                str(out),
                "--adapter",
                str(out / "a"),
                "--out",
                str(out / "run"),
                "--overwrite",
            ]
        )


@pytest.mark.parametrize(
    "place, message",
    [
        (
            "thesis",
            "thesis is there already and holds no merged_adapters.json, so it does not come from "
            "here: choose another --out",
        ),
        ("full_sft_16x1", "full_sft_16x1 holds .*full_sft_16x1, which is read here"),
        ("a", "/a holds .*/a, which is read here"),
        ("link", "link holds .*full_sft_16x1, which is read here"),
        (".", "holds .*full_sft_16x1, which is read here"),
    ],
)
def test_only_its_own_results_are_replaced(place, message, out):
    (out / "thesis").mkdir()
    (out / "thesis" / "chapter1.tex").write_text("years")
    (out / "link").symlink_to(out / "full_sft_16x1")
    for folder in ("full_sft_16x1", "a", "."):
        (out / folder / "merged_adapters.json").write_text('{"adapters": []}')
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=message):
        main(
            [
                "--save_dir",
                str(out),
                "--adapter",
                str(out / "a"),
                "--out",
                str(out / place),
                "--overwrite",
            ]
        )
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_replacement_that_is_cut_off_loses_nothing(out, monkeypatch):
    command = ["--save_dir", str(out), "--out", str(out / "merged"), "--overwrite", "--adapter"]
    main([*command, str(out / "a")])
    first, rename = logits(out / "merged"), Path.rename

    def cut(path, target):
        if path.name == ".merged.new":
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", cut)
        main([*command, str(out / "b")])
    assert torch.equal(logits(out / ".merged.old"), first)
    main([*command, str(out / "b")])
    torch.testing.assert_close(
        logits(out / "merged"), unmerged(out / "full_sft_16x1", out / "b"), rtol=1e-4, atol=1e-5
    )
    assert not [path for path in out.iterdir() if path.name.startswith(".merged")]


def test_an_adapter_of_another_network_is_said(out, tmp_path):
    base = tmp_path / "other"
    save_base(base, rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    with pytest.warns(UserWarning, match="/a was trained on another network than this"):
        main(
            [
                "--from_weight",
                str(base),
                "--adapter",
                str(out / "a"),
                "--out",
                str(tmp_path / "merged"),
            ]
        )


def test_mistakes_are_named_and_leave_nothing(out, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--save_dir", str(out)])
    assert "--adapter is missing" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"no adapter is found as 'nowhere': .* only a, b\. Give"):
        main(["--save_dir", str(out), "--adapter", str(out / "a"), "nowhere"])
    with pytest.raises(
        ValueError,
        match=r"a is an adapter, .*convert_model\.py merge --from_weight .*full_sft_16x1 --adapter",
    ):
        main(["--save_dir", str(out), "--from_weight", str(out / "a"), "--adapter", str(out / "b")])
    shutil.copytree(out / "a", out / "lora_16x1")
    with pytest.raises(ValueError, match=r"lora_16x1 is an adapter"):
        main(["--save_dir", str(out), "--from_weight", "lora", "--adapter", str(out / "b")])
    save_base(tmp_path / "wide", head_dim=16)
    with pytest.raises(ValueError, match=r"k_proj is \[.*\] in the network"):
        main(
            [
                "--save_dir",
                str(out),
                "--from_weight",
                str(tmp_path / "wide"),
                "--adapter",
                str(out / "a"),
            ]
        )
    assert not [path for path in out.iterdir() if "merged" in path.name]


def test_an_adapter_that_taught_to_chat_brings_its_template(tmp_path):
    base, adapter = tmp_path / "pretrain", tmp_path / "adapter"
    save_base(base, template=False)
    save_adapter(adapter, base, 1)
    (adapter / "chat_template.jinja").write_text("{{ messages[0].content }}")
    main(["--from_weight", str(base), "--adapter", str(adapter), "--out", str(tmp_path / "merged")])
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template
        == "{{ messages[0].content }}"
    )
    assert not AutoTokenizer.from_pretrained(base).chat_template

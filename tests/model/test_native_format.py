"""Folders that transformers loads in a process without this project, and everything that our own loader must refuse."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.native_format import replace_file
from tests.model.test_model_minimind import SHAPES, SMALL, assert_close, build, token_ids

AUTO_MAP = {**SHAPES["granitemoeshared"], "qk_norm": True}  # no standard architecture has both

FOREIGN_LOADER = """
import importlib.util, sys, torch
from transformers import AutoModelForCausalLM
folder, trust, out = sys.argv[1:]
assert importlib.util.find_spec("model") is None and importlib.util.find_spec("trainer") is None, sys.path
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust == "trust")
torch.save((type(model).__name__, model(torch.load(out)).logits), out)
"""


def logits_elsewhere(folder, tmp_path, trust=False):
    """Load `folder` in a fresh interpreter that runs in an empty folder and cannot import this project."""
    empty, out = tmp_path / "empty", tmp_path / "logits.pt"
    empty.mkdir()
    torch.save(token_ids(), out)
    env = {"HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin", "HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-I", "-c", FOREIGN_LOADER, str(folder), "trust" if trust else "-", str(out)],
                   cwd=empty, env=env, check=True, capture_output=True, text=True)
    return torch.load(out)


@pytest.mark.parametrize("kind, architecture", [
    ("llama", "LlamaForCausalLM"), ("qwen3", "Qwen3ForCausalLM"), ("qwen3_moe", "Qwen3MoeForCausalLM"),
    ("granitemoeshared", "GraniteMoeSharedForCausalLM")])
def test_transformers_loads_it_without_the_project(kind, architecture, tmp_path):
    model = build(kind).eval()
    model.save_pretrained(tmp_path / "saved")
    assert not list((tmp_path / "saved").glob("*.py"))
    name, logits = logits_elsewhere(tmp_path / "saved", tmp_path)
    assert name == architecture
    assert_close(logits, model(token_ids()).logits)


def test_without_a_standard_architecture_the_code_travels_along(tmp_path):
    torch.manual_seed(0)
    model = MiniMindForCausalLM(MiniMindConfig(**AUTO_MAP)).eval()
    model.save_pretrained(tmp_path / "saved")
    name, logits = logits_elsewhere(tmp_path / "saved", tmp_path, trust=True)
    assert name == "MiniMindForCausalLM"
    assert_close(logits, model(token_ids()).logits)
    again = MiniMindForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(again(token_ids()).logits, model(token_ids()).logits)


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("tied", [True, False])
def test_our_loader_reads_back_what_it_wrote(kind, tied, tmp_path):
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
    model = build(kind, tie_word_embeddings=tied, rope_parameters=yarn, max_position_embeddings=64).eval()
    model.save_pretrained(tmp_path)
    again = MiniMindForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(token_ids()).logits, model(token_ids()).logits)
    ignored = {"_name_or_path", "dtype", "architectures", "intermediate_size", "transformers_version"}
    theirs = {k: v for k, v in again.config.to_dict().items() if k not in ignored}
    assert theirs == {k: v for k, v in model.config.to_dict().items() if k not in ignored}


@pytest.mark.parametrize("kind", ["llama", "qwen3", "qwen3_moe", "granitemoeshared"])
def test_our_loader_reads_what_transformers_wrote(kind, tmp_path):
    from tests.model.test_model_minimind import REFERENCES

    build(kind).save_pretrained(tmp_path / "ours")
    reference = REFERENCES[kind].from_pretrained(tmp_path / "ours").eval()
    reference.save_pretrained(tmp_path / "theirs")
    model = MiniMindForCausalLM.from_pretrained(tmp_path / "theirs", dtype=torch.float32)
    assert_close(model(token_ids()).logits, reference(token_ids()).logits)


def test_pth_state_dicts_of_this_family(tmp_path):
    model = build("qwen3").eval()
    old = {f"module._orig_mod.{name}": x.half() for name, x in model.state_dict().items()}
    old["model.freqs_cos"] = torch.zeros(4)
    torch.save(old, tmp_path / "full_sft_32.pth")
    again = MiniMindForCausalLM.from_pth(tmp_path / "full_sft_32.pth", model.config)
    assert again.dtype == torch.float32
    assert_close(again(token_ids()).logits, model(token_ids()).logits, 2e-2)

    shared = build("granitemoeshared").eval()
    old = {}
    for name, x in shared.state_dict().items():  # the older mixture: one module per expert, a list of shared ones
        if name.endswith("experts.gate_up_proj"):
            for e in range(4):
                for part, y in zip(("gate_proj", "up_proj"), x[e].chunk(2)):
                    old[name.replace("gate_up_proj", f"{e}.{part}.weight")] = y.clone()
        elif name.endswith("experts.down_proj"):
            old |= {name.replace("down_proj", f"{e}.down_proj.weight"): x[e].clone() for e in range(4)}
        else:
            old[name.replace("shared_expert.", "shared_experts.0.")] = x
    torch.save({"model": old}, tmp_path / "moe.pth")
    again = MiniMindForCausalLM.from_pth(tmp_path / "moe.pth", shared.config)
    assert torch.equal(again(token_ids()).logits, shared(token_ids()).logits)


def damage(folder, how):
    weights, config = folder / "model.safetensors", folder / "config.json"
    if how == "no folder":
        return folder / "nowhere"
    if how == "half-written weights":
        weights.write_bytes(weights.read_bytes()[:-200])
    elif how == "no weights":
        weights.unlink()
    elif how == "half-written config":
        config.write_text(config.read_text()[:40])
    elif how == "another architecture":
        config.write_text(json.dumps({**json.loads(config.read_text()), "model_type": "gpt2"}))
    elif how == "an option we lack":
        config.write_text(json.dumps({**json.loads(config.read_text()), "attention_bias": True}))
    elif how == "a missing weight":
        state = load_file(weights)
        del state["model.norm.weight"]
        save_file(state, weights)
    elif how == "another shape":
        save_file({**load_file(weights), "model.norm.weight": torch.ones(5)}, weights)
    elif how == "an extra weight":
        save_file({**load_file(weights), "model.extra": torch.ones(5)}, weights)
    return folder


@pytest.mark.parametrize("how, message", [
    ("no folder", r"nowhere.config.json is missing"), ("half-written weights", "model.safetensors is damaged"),
    ("no weights", r"holds no \*.safetensors"), ("half-written config", r"config.json:\d+: not JSON"),
    ("another architecture", "model_type 'gpt2' cannot be read"), ("an option we lack", "attention_bias=True is not supported"),
    ("a missing weight", "model.norm.weight: missing"),
    ("another shape", r"model.norm.weight: shape \[5\], the network has \[32\]"),
    ("an extra weight", "model.extra: not part of this network")])
def test_bad_folders_are_refused(how, message, tmp_path):
    build("qwen3").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        MiniMindForCausalLM.from_pretrained(damage(tmp_path, how))


def test_bad_pth_files_are_refused(tmp_path):
    config = MiniMindConfig(**SMALL)
    (tmp_path / "junk.pth").write_bytes(b"not a checkpoint")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"w": 1}, tmp_path / "number.pth")
    for name, message in (("none.pth", "does not exist"), ("junk.pth", "is not a PyTorch state dict"),
                          ("list.pth", "does not hold a state dict"), ("number.pth", "does not hold a state dict")):
        with pytest.raises(ValueError, match=message):
            MiniMindForCausalLM.from_pth(tmp_path / name, config)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_text("old")

    def full_disk(temporary):
        temporary.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=r"could not write .*model.safetensors.*No space left.*Free some space"):
        replace_file(path, full_disk)
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]

"""Folders that transformers loads in a process without this project, and everything that our own
loader must refuse.
"""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.model_minimind import MiniMindForCausalLM
from model.native_format import CODE_FILES
from tests.helpers.networks import REFERENCES, SHAPES, assert_close, build, token_ids

KINDS = ("llama", "qwen3", "qwen3_moe", "granitemoeshared")
YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=16)

FOREIGN_LOADER = """
import importlib.util, sys, torch
from transformers import AutoModelForCausalLM
assert importlib.util.find_spec("model") is None, sys.path
ids, found = torch.load("ids.pt"), {}
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=folder == "minimind")
    found[folder] = type(model).__name__, model(ids).logits
torch.save(found, "found.pt")
"""


def test_transformers_loads_folders_without_the_project(tmp_path):
    """In a fresh interpreter that cannot import this project; where no standard architecture fits,
    the code travels with the weights.
    """
    models = {kind: build(kind).eval() for kind in KINDS}
    models["minimind"] = build("granitemoeshared", qk_norm=True).eval()
    for kind, model in models.items():
        model.save_pretrained(tmp_path / kind)
        code = {path.name for path in (tmp_path / kind).glob("*.py")}
        assert code == (set(CODE_FILES) if kind == "minimind" else set())
    torch.save(token_ids(), tmp_path / "ids.pt")
    env = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", "-c", FOREIGN_LOADER, *models]
    subprocess.run(command, cwd=tmp_path, env=env, check=True, capture_output=True, text=True)
    found = torch.load(tmp_path / "found.pt")
    for kind, model in models.items():
        name, logits = found[kind]
        assert name == REFERENCES.get(kind, MiniMindForCausalLM).__name__
        assert_close(logits, model(token_ids()).logits)
    again = MiniMindForCausalLM.from_pretrained(tmp_path / "minimind")
    assert torch.equal(again(token_ids()).logits, models["minimind"](token_ids()).logits)


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("tied", [True, False])
def test_our_loader_reads_back_what_it_wrote(kind, tied, tmp_path):
    rope = dict(rope_parameters=dict(YARN), max_position_embeddings=64)
    model = build(kind, tie_word_embeddings=tied, **rope).eval()
    model.save_pretrained(tmp_path)
    again = MiniMindForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(token_ids()).logits, model(token_ids()).logits)
    before, after = model.config.to_dict(), again.config.to_dict()
    for name in ("_name_or_path", "dtype", "architectures", "intermediate_size"):
        before.pop(name, None), after.pop(name, None)
    assert before == after


@pytest.mark.parametrize("kind", KINDS)
def test_our_loader_reads_what_transformers_wrote(kind, tmp_path):
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
    again = MiniMindForCausalLM.from_pth(tmp_path / "full_sft_32.pth")
    assert again.dtype == torch.float32
    assert_close(again(token_ids()).logits, model(token_ids()).logits, 2e-2)

    shared = build("granitemoeshared").eval()
    old = {}  # the older mixture: one module per expert, a list of shared ones
    for name, x in shared.state_dict().items():
        if name.endswith("experts.gate_up_proj"):
            for e in range(4):
                for part, y in zip(("gate_proj", "up_proj"), x[e].chunk(2)):
                    old[name.replace("gate_up_proj", f"{e}.{part}.weight")] = y.clone()
        elif name.endswith("experts.down_proj"):
            for e in range(4):
                old[name.replace("down_proj", f"{e}.down_proj.weight")] = x[e].clone()
        else:
            old[name.replace("shared_expert.", "shared_experts.0.")] = x
    torch.save({"model": old}, tmp_path / "moe.pth")
    again = MiniMindForCausalLM.from_pth(
        tmp_path / "moe.pth", rms_norm_eps=1e-6, num_attention_heads=4
    )
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


@pytest.mark.parametrize(
    "how, message",
    [
        ("no folder", r"nowhere.config.json is missing"),
        ("half-written weights", "model.safetensors is damaged"),
        ("no weights", r"holds no \*.safetensors"),
        ("half-written config", r"config.json:\d+: not JSON"),
        ("another architecture", "model_type 'gpt2' cannot be read"),
        ("an option we lack", "attention_bias=True is not supported"),
        ("a missing weight", "model.norm.weight: missing"),
        ("another shape", r"model.norm.weight: shape \[5\], the network has \[32\]"),
        ("an extra weight", "model.extra: not part of this network"),
    ],
)
def test_bad_folders_are_refused(how, message, tmp_path):
    build("qwen3").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        MiniMindForCausalLM.from_pretrained(damage(tmp_path, how))


def test_bad_pth_files_are_refused(tmp_path):
    (tmp_path / "junk.pth").write_bytes(b"not a checkpoint")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"w": 1}, tmp_path / "number.pth")
    for name, message in (
        ("none.pth", "does not exist"),
        ("junk.pth", "is not a PyTorch state dict"),
        ("list.pth", "does not hold a state dict"),
        ("number.pth", "does not hold a state dict"),
    ):
        with pytest.raises(ValueError, match=message):
            MiniMindForCausalLM.from_pth(tmp_path / name)

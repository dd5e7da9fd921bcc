"""The LoRA stage from end to end: PEFT's step, files, accumulation, ranks, resumption, mistakes."""

import importlib.util
import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from dataset.chat.format import encode_conversation
from model.model_lora import merge_adapter
from model.model_minimind import MiniMindForCausalLM
from tests.helpers.checkpoints import random_network, write_checkpoint
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import assert_same, interrupt, losses, metrics
from trainer import train_lora
from trainer.runtime import data
from trainer.runtime.arguments import ROOT
from trainer.runtime.metrics import read_metrics
from trainer.runtime.run import Run

SHAPE = dict(
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    qk_norm=True,
    initializer_range=0.1,
)
needs_deepspeed = pytest.mark.skipif(
    not importlib.util.find_spec("deepspeed"), reason="DeepSpeed is not installed"
)


def write_base(folder, seed=0, **shape):
    return write_checkpoint(folder, random_network(seed, **SHAPE, **shape))


@pytest.fixture
def lora(flags, tmp_path):
    """lora(**changes): the command line of a short run on a network of random weights; moe: on one
    with experts.
    """

    def make(*switches, moe=False, **changes):
        base = tmp_path / f"base_{moe}"
        if not base.is_dir():
            write_base(base, **(dict(num_experts=4, moe_intermediate_size=32) if moe else {}))
        return [*flags("sft", **{"from_weight": base, "rank": 4, "alpha": 8, **changes}), *switches]

    return make


def name(moe=False):
    return "lora_32x2" + ("_moe" if moe else "")


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("options", [{}, {"use_dora": 1, "use_rslora": 1}])
def test_the_first_step_is_that_of_peft_row_by_row(options, lora, rows, tmp_path):
    """Loss, gradient norm and matrices after AdamW, without packing. A has no gradient while B is
    0: its beginning is known.
    """
    train_lora.main(
        lora(
            val_ratio=0, batch_size=100, max_steps=1, learning_rate=1e-2, grad_clip=0.01, **options
        )
    )
    folder = tmp_path / "out" / name()
    peft = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base_False"), folder, is_trainable=True
    )
    peft = peft.double().train()
    trained = {key: x for key, x in peft.named_parameters() if x.requires_grad}
    expected = {key: x.detach().clone() for key, x in trained.items()}
    with torch.no_grad():
        for key, x in trained.items():
            if "lora_B" in key:
                x.zero_()
            elif "magnitude" in key:
                layer = key.removeprefix("base_model.model.").partition(".lora")[0]
                x.copy_(peft.base_model.model.get_submodule(layer).base_layer.weight.norm(dim=1))
    nlls, count = 0, 0
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "model")
    for line in rows["sft"].read_text().splitlines():
        ids, is_target = (
            torch.tensor(x)
            for x in encode_conversation(tokenizer, json.loads(line)["conversations"])
        )
        nlls = nlls + F.cross_entropy(
            peft(ids[None]).logits[0, :-1][is_target[1:]], ids[1:][is_target[1:]], reduction="sum"
        )
        count += int(is_target[1:].sum())
    (nlls / count).backward()
    row = read_metrics(folder / "metrics.jsonl")[0]
    norm = torch.nn.utils.clip_grad_norm_(trained.values(), 0.01)
    assert (row["loss"], row["grad_norm"], row["targets"]) == pytest.approx(
        ((nlls / count).item(), norm.item(), count), rel=1e-4
    )
    torch.optim.AdamW(trained.values(), lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0).step()
    for key, x in trained.items():
        torch.testing.assert_close(x.detach(), expected[key], rtol=1e-3, atol=2e-5)


def test_a_run_learns_and_leaves_the_adapter_alone(lora, tmp_path):
    command = lora(max_steps=30, epochs=4, learning_rate=1e-2)
    base = tmp_path / "base_False"
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    train_lora.main(command)
    folder = tmp_path / "out" / name()
    # next to frozen random weights there is not much to learn
    assert losses(folder)[-1] < 0.9 * losses(folder)[0]
    held_out = [
        row["val_bpb/held_out"]
        for row in read_metrics(folder / "metrics.jsonl")
        if "val_bpb/held_out" in row
    ]
    assert held_out[-1] < 0.98 * held_out[0]
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before
    common = {
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    assert {path.name for path in folder.iterdir()} == common | {
        "arguments.json",
        "checkpoints",
        "loss.png",
        "metrics.jsonl",
    }
    saved = folder / "checkpoints" / "step-30"
    assert {path.name for path in saved.iterdir()} == common | {
        "training_state.pt",
        "progress.json",
        "manifest.json",
    }
    trained = sum(x.numel() for x in weights(folder).values())
    assert trained == 2 * 4 * (4 * 32 + 2 * (32 + 16) + 3 * (32 + 64))
    size = (saved / "training_state.pt").stat().st_size
    assert size < 2 * 4 * trained + 40_000  # two states of the trained weights, and names
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (
        config["base_model_name_or_path"] == str(base)
        and config["r"] == 4
        and config["lora_alpha"] == 8
    )
    ids = torch.arange(20, 60).view(2, 20)
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
    ours = merge_adapter(MiniMindForCausalLM.from_pretrained(base), folder)
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)


def test_a_base_inside_the_project_is_named_from_its_root(lora, tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.runtime.weights.ROOT", tmp_path)
    (tmp_path / "model").symlink_to(ROOT / "model")
    train_lora.main(lora(max_steps=1))
    config = json.loads((tmp_path / "out" / name() / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "base_False"


@pytest.mark.parametrize("moe", [False, True])
def test_the_update_does_not_depend_on_how_the_batch_is_cut(moe, lora, tmp_path):
    results = []
    for batch_size, accumulation_steps in ((12, 1), (4, 3), (3, 4)):
        save_dir = tmp_path / f"{batch_size}"
        train_lora.main(
            lora(
                moe=moe,
                save_dir=save_dir,
                max_steps=1,
                val_ratio=0,
                max_seq_len=48,
                batch_size=batch_size,
                accumulation_steps=accumulation_steps,
            )
        )
        folder = save_dir / name(moe)
        results.append(
            (
                losses(folder),
                weights(folder),
                read_metrics(folder / "metrics.jsonl")[0]["grad_norm"],
            )
        )
    for loss, weight, grad_norm in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-5)
        assert grad_norm == pytest.approx(results[0][2], rel=1e-4)
        for key in weight:  # AdamW makes much of the rounding of the few gradients that are near 0
            difference = (weight[key] - results[0][1][key]).abs()
            assert difference.max() < 1e-4 and difference.mean() < 1e-6


@pytest.mark.parametrize(
    "moe, options",
    [
        (False, {"lora_dropout": 0.2, "gradient_checkpointing": 1, "use_dora": 1}),
        (True, {"optimizer": "muon", "weight_decay": 0.1}),
        (False, {"target_modules": "v_proj", "use_rslora": 1, "dtype": "bfloat16", "dropout": 0.1}),
    ],
)
def test_an_interrupted_run_resumes_bit_for_bit(moe, options, lora, tmp_path, monkeypatch):
    options = {**options, "moe": moe, "max_steps": 10, "epochs": 3}
    train_lora.main(lora(save_dir=tmp_path / "whole", **options))
    interrupt(train_lora, lora(**options))
    again, rate_at = [], train_lora.learning_rate_at
    monkeypatch.setattr(
        train_lora, "learning_rate_at", lambda step, *x: again.append(step) or rate_at(step, *x)
    )
    train_lora.main(lora("--from_resume", **options))
    assert again == list(range(4, 10))
    whole, resumed = tmp_path / "whole" / name(moe), tmp_path / "out" / name(moe)
    assert all(x.dtype == torch.float32 for x in weights(whole).values())
    assert_same(weights(resumed), weights(whole))
    assert metrics(resumed) == metrics(whole)


def assert_close_runs(a, b):
    ours, theirs = weights(a), weights(b)
    assert ours.keys() == theirs.keys()
    for key in ours:
        difference = (ours[key] - theirs[key]).abs()
        assert difference.max() < 3e-4 and difference.mean() < 2e-6
    for one, other in zip(
        *(read_metrics(folder / "metrics.jsonl") for folder in (a, b)), strict=True
    ):
        for key in {"loss", "val_loss/held_out", "targets", "grad_norm"} & one.keys():
            assert one[key] == pytest.approx(other[key], rel=5e-4 if key == "grad_norm" else 2e-5)


@pytest.mark.parametrize(
    "moe, deepspeed",
    [(False, ""), (True, ""), pytest.param(False, "trainer/ds_zero2.json", marks=needs_deepspeed)],
)
def test_two_ranks_learn_what_one_learns(moe, deepspeed, lora, tmp_path):
    options = dict(
        moe=moe, max_steps=10, epochs=20, max_seq_len=32, save_interval=50, val_interval=10
    )
    train_lora.main(lora(save_dir=tmp_path / "one", batch_size=6, accumulation_steps=2, **options))
    more = {"deepspeed": deepspeed} if deepspeed else {}
    run_ranks(
        2,
        "lora",
        lora(save_dir=tmp_path / "two", batch_size=3, accumulation_steps=2, **options, **more),
    )
    assert_close_runs(tmp_path / "one" / name(moe), tmp_path / "two" / name(moe))


@needs_deepspeed
def test_a_run_is_resumed_sharded(lora, tmp_path):
    """With frozen parameters that are distributed over the ranks too. DoRA's lengths are a group of
    their own in the optimizer.
    """
    options = dict(
        max_steps=8, epochs=20, max_seq_len=32, save_interval=4, val_interval=8, use_dora=1
    )
    train_lora.main(lora(save_dir=tmp_path / "one", batch_size=4, **options))
    train_lora.main(lora(batch_size=4, **options))
    folder = tmp_path / "out" / name()
    shutil.rmtree(folder / "checkpoints" / "step-8")
    out = run_ranks(
        2, "lora", lora("--from_resume", batch_size=2, deepspeed="trainer/ds_zero3.json", **options)
    )
    assert "resumed after step 4" in out
    assert_close_runs(tmp_path / "one" / name(), folder)


def test_a_run_is_resumed_only_as_it_was(lora, tmp_path):
    train_lora.main(lora())
    for changes, message in (
        (dict(rank=8), "--rank 4 -> 8"),
        (dict(use_dora=1), "--use_dora False -> True"),
        (dict(target_modules="q_proj"), "--target_modules"),
    ):
        with pytest.raises(ValueError, match=message):
            train_lora.main(lora("--from_resume", **changes))
    write_base(tmp_path / "base_False", seed=5)
    with pytest.raises(
        ValueError, match=r"was trained on another network than .*base_False is now"
    ):
        train_lora.main(lora("--from_resume"))


def test_a_run_is_replaced_wholly(lora, tmp_path):
    train_lora.main(lora(max_steps=1))
    interrupt(train_lora, lora("--overwrite", max_steps=1), step=0)
    assert sorted(path.name for path in (tmp_path / "out" / name()).iterdir()) == [
        "arguments.json",
        "metrics.jsonl",
    ]


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(from_weight="none"), "--from_weight none: an adapter changes"),
        (dict(rank=0), "give a rank of 1 or more"),
        (dict(lora_dropout=1), "a dropout from 0 to less than 1"),
    ],
)
def test_flags_without_sense_are_refused(options, message, lora, capsys):
    with pytest.raises(SystemExit):
        train_lora.main(lora(**options))
    assert message in capsys.readouterr().err


def test_what_cannot_be_adapted_is_refused_before_training(lora, tmp_path, monkeypatch):
    monkeypatch.delattr(Run, "wrap")
    for options, message in (
        (dict(target_modules="w1"), "no layer w1; there are q_proj"),
        (dict(moe=True, use_dora=1), "use_dora together with experts"),
        (dict(moe=True, lora_dropout=0.1), "dropout together with experts"),
    ):
        with pytest.raises(ValueError, match=message):
            train_lora.main(lora(**options))
    monkeypatch.undo()
    train_lora.main(lora(max_steps=1))
    with pytest.raises(
        ValueError,
        match=r"lora_32x2 is an adapter.*convert_model\.py merge --from_weight .*base_False",
    ):
        train_lora.main(lora(from_weight="lora"))


def test_inspect_prints_rows_and_trains_nothing(lora, tmp_path, capsys):
    train_lora.main(lora(inspect=1))
    assert "<|im_end|>⟧" in capsys.readouterr().out and not (tmp_path / "out").exists()


def test_by_default_the_toy_world_is_learned_with_some_of_the_old(lora, tmp_path, monkeypatch):
    """Which are written where they are missing."""
    monkeypatch.setattr(data, "TOY", tmp_path / "toy")
    train_lora.main(lora(max_steps=1, data_path=None))
    used = json.loads((tmp_path / "out" / name() / "arguments.json").read_text())["data_path"]
    assert used[0].startswith(f"{tmp_path}/toy/lora_train.jsonl") and used[-1].startswith(
        f"{tmp_path}/toy/sft_train.jsonl@0."
    )

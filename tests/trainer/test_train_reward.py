"""Training a reward model from end to end: progress, files, every way to cut a step, mistakes."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from dataset.chat.format import encode_conversation
from model.reward_model import MiniMindForSequenceClassification
from scripts.web.run_folders import find_checkpoints
from tests.helpers.pair_rows import last_step_rows, pair_flags, write_pairs, write_start
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import interrupt
from trainer import train_reward
from trainer.rl.reward_sources import score_conversations
from trainer.runtime.metrics import read_metrics

MOE = dict(num_experts=4, num_experts_per_tok=2, router_aux_loss_coef=0.5)


@pytest.fixture
def flags(tmp_path):
    """flags(**changes) of a short run; moe=True starts from a mixture of experts."""
    write_pairs(tmp_path / "pairs.jsonl")
    starts = {
        moe: write_start(tmp_path / f"start{moe}", **(MOE if moe else {})) for moe in (False, True)
    }
    return lambda moe=False, **changes: pair_flags(tmp_path, starts[moe], **changes)


def run(tmp_path, flags):
    """Train; returns (folder, the metrics of each training step, of each validation)."""
    train_reward.main(flags)
    folder = next((tmp_path / "out").iterdir())
    rows = read_metrics(folder / "metrics.jsonl")
    return (
        folder,
        [row for row in rows if "loss" in row],
        [row for row in rows if "val_loss/held_out" in row],
    )


def assert_same(a, b, **tolerance):
    a, b = (load_file(folder / "model.safetensors") for folder in (a, b))
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], **{"rtol": 0, "atol": 0, **tolerance})


def test_a_run_learns_and_transformers_finds_its_rewards(flags, tmp_path):
    folder, steps, validations = run(tmp_path, flags(max_steps=16, json=tmp_path / "metrics.json"))
    assert folder.name == "reward_32x2" and not (folder / "generation_config.json").exists()
    assert (
        not find_checkpoints(tmp_path / "out") and (folder / "loss.png").is_file()
    )  # nobody can chat with it
    assert steps[-1]["loss"] < 0.2 < 0.5 < steps[0]["loss"]
    assert [row["step"] for row in validations] == [0, 4, 8, 12, 16]
    assert validations[0]["val_loss/held_out"] > 0.5 and validations[-1]["val_loss/held_out"] < 0.2
    assert (
        validations[-1]["val_rewards/accuracies/held_out"] == 1
        and validations[-1]["val_rewards/margins/held_out"] > 2
    )
    assert (
        json.loads((tmp_path / "metrics.json").read_text())["val_rewards/accuracies/held_out"] == 1
    )
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    model, tokenizer = (
        MiniMindForSequenceClassification.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    chosen, rejected = (
        score_conversations(model, tokenizer, [row[side] for row in rows])
        for side in ("chosen", "rejected")
    )
    assert (chosen > rejected).float().mean() > 0.95
    ids = torch.tensor([encode_conversation(tokenizer, rows[0]["chosen"])[0]])
    theirs = AutoModelForSequenceClassification.from_pretrained(folder)(ids).logits[0, 0]
    torch.testing.assert_close(theirs, chosen[0], rtol=1e-4, atol=1e-4)


def test_the_first_gradient_is_that_of_plain_forwards(flags, tmp_path):
    """A step that changes nothing leaves the network it began with: all again, from each side
    alone, with transformers.
    """
    folder, (step,), _ = run(
        tmp_path,
        flags(
            max_steps=1,
            batch_size=99,
            val_ratio=0,
            center_rewards_coefficient=0.05,
            learning_rate=1e-12,
        ),
    )
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )

    def reward(messages):
        return model(torch.tensor([encode_conversation(tokenizer, messages)[0]])).logits[0, 0]

    chosen, rejected = (
        torch.stack([reward(row[side]) for row in rows]) for side in ("chosen", "rejected")
    )
    loss = (torch.log1p(torch.exp(rejected - chosen)) + 0.05 * (chosen + rejected) ** 2).mean()
    loss.backward()
    norm = torch.nn.utils.get_total_norm([x.grad for x in model.parameters()])
    assert step["loss"] == pytest.approx(loss.item(), rel=1e-5) and step[
        "grad_norm"
    ] == pytest.approx(norm.item(), rel=1e-4)
    assert step["rewards/chosen"] == pytest.approx(chosen.mean().item(), abs=1e-5)
    assert step["rewards/margins"] == pytest.approx((chosen - rejected).mean().item(), abs=1e-5)
    assert step["rewards/accuracies"] == pytest.approx((chosen > rejected).float().mean().item())
    assert step["targets"] == 2 * len(rows)  # the rewards that were read


@pytest.mark.parametrize("moe", [False, True])
def test_the_update_does_not_depend_on_how_the_batch_is_cut(moe, flags, tmp_path):
    results = []
    for batch_size, accumulation_steps in ((12, 1), (4, 3), (3, 4)):
        place = tmp_path / f"{batch_size}"
        results.append(
            run(
                place,
                flags(
                    moe,
                    save_dir=place / "out",
                    max_steps=2,
                    val_ratio=0,
                    batch_size=batch_size,
                    accumulation_steps=accumulation_steps,
                ),
            )
        )
    for folder, steps, _ in results[1:]:
        for row, first in zip(steps, results[0][1]):
            for name in ("loss", "grad_norm", "rewards/margins", "rewards/accuracies", "targets"):
                assert row[name] == pytest.approx(first[name], rel=2e-4, abs=2e-5), name
        assert_same(folder, results[0][0], rtol=1e-4, atol=2e-5)


def test_an_interrupted_run_resumes_bit_for_bit(flags, tmp_path):
    whole = run(tmp_path / "whole", flags(moe=True, save_dir=tmp_path / "whole" / "out"))
    interrupt(train_reward, flags(moe=True))
    resumed = run(tmp_path, [*flags(moe=True), "--from_resume"])
    assert_same(resumed[0], whole[0])
    assert [row["loss"] for row in resumed[1]] == [row["loss"] for row in whole[1]]
    assert [row["val_loss/held_out"] for row in resumed[2]] == [
        row["val_loss/held_out"] for row in whole[2]
    ]


def test_two_ranks_learn_what_one_learns(flags, tmp_path):
    write_pairs(tmp_path / "pairs.jsonl", 18)
    assert last_step_rows(tmp_path, 4) == 1
    options = dict(moe=True, max_steps=None, epochs=1, val_ratio=0, learning_rate=1e-3)
    alone = run(
        tmp_path / "alone",
        flags(**options, accumulation_steps=2, save_dir=tmp_path / "alone" / "out"),
    )
    run_ranks(2, "reward", flags(**options, save_dir=tmp_path / "two" / "out"))
    folder = next((tmp_path / "two" / "out").iterdir())
    assert_same(folder, alone[0], rtol=1e-3, atol=2e-5)
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]
    for ours, theirs in zip(rows, alone[1], strict=True):
        for name in ("loss", "grad_norm", "rewards/margins", "rewards/accuracies", "targets"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-4), name


def test_long_pairs_are_left_out(flags, tmp_path, capsys):
    row = json.loads((tmp_path / "pairs.jsonl").read_text().splitlines()[0])
    row["chosen"][1]["content"] *= 50
    with open(tmp_path / "pairs.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")
    train_reward.main(flags(max_steps=1))
    out = capsys.readouterr().out
    assert "61 read, 60 used, 0 cut" in out and "pairs.jsonl:61" in out


def test_what_cannot_work_is_refused_before_training(flags, tmp_path, capsys):
    shared = write_start(
        tmp_path / "shared",
        qk_norm=False,
        norm_topk_prob=True,
        shared_expert_intermediate_size=32,
        **MOE,
    )
    with pytest.raises(ValueError, match="no sequence classifier of the type granitemoeshared"):
        train_reward.main(flags(from_weight=shared))
    assert not (tmp_path / "out").exists()
    for wrong, message in (
        ({"dropout": 0.1}, "--dropout would add"),
        ({"center_rewards_coefficient": -1}, "--center_rewards_coefficient -1.0: give 0"),
    ):
        with pytest.raises(SystemExit):
            train_reward.main(flags(**wrong))
        assert message in capsys.readouterr().err

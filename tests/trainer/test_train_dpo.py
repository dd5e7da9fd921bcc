"""Learning from preferences from end to end: progress, the frozen reference, every way to cut a
step, resumption, mistakes.
"""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from dataset.chat.format import encode_conversation
from tests.helpers.pair_rows import last_step_rows, pair_flags, talk, write_pairs, write_start
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import interrupt
from trainer import train_dpo
from trainer.runtime.metrics import read_metrics
from trainer.runtime.pairs import Reference

MOE = dict(num_experts=4, num_experts_per_tok=2, router_aux_loss_coef=0.5)


@pytest.fixture
def flags(tmp_path):
    """flags(**changes) of a short run; moe=True starts from a mixture of experts."""
    write_pairs(tmp_path / "pairs.jsonl")
    starts = {
        moe: write_start(tmp_path / f"start{moe}", **(MOE if moe else {})) for moe in (False, True)
    }
    return lambda moe=False, **changes: pair_flags(tmp_path, starts[moe], **changes)


def run(tmp_path, flags, name="dpo_32x2"):
    """Train; returns (weights, the metrics of each training step, of each validation)."""
    train_dpo.main(flags)
    folder = next(
        path for path in tmp_path.glob("*/*") if path.name.startswith(name) and path.is_dir()
    )
    rows = read_metrics(folder / "metrics.jsonl")
    return (
        load_file(folder / "model.safetensors"),
        [row for row in rows if "loss" in row],
        [row for row in rows if "val_loss/held_out" in row],
    )


def assert_same(a, b, **tolerance):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], **{"rtol": 0, "atol": 0, **tolerance})


def test_a_run_learns_the_preference_and_leaves_a_standard_folder(flags, tmp_path):
    _, steps, validations = run(tmp_path, flags(max_steps=16, json=tmp_path / "metrics.json"))
    first, last = validations[0], validations[-1]
    assert (first["step"], last["step"]) == (0, 16) and steps[0]["loss"] == pytest.approx(
        math.log(2), abs=1e-5
    )
    assert first["val_loss/held_out"] == pytest.approx(math.log(2), abs=1e-5)
    assert (
        abs(first["val_rewards/margins/held_out"]) < 1e-4
        and last["val_rewards/margins/held_out"] > 1
    )
    assert (
        last["val_rewards/accuracies/held_out"] == 1
        and last["val_loss/held_out"] < 0.4
        and steps[-1]["loss"] < 0.4
    )
    for row in steps:
        assert row["rewards/margins"] == pytest.approx(
            row["rewards/chosen"] - row["rewards/rejected"], abs=1e-6
        )
    assert (
        json.loads((tmp_path / "metrics.json").read_text())["val_rewards/accuracies/held_out"] == 1
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "dpo_32x2")
    assert type(model).__name__ == "Qwen3ForCausalLM"


def test_the_first_gradient_is_that_of_plain_forwards(flags, tmp_path):
    """One step on all rows, computed from each side alone with transformers' own network: loss,
    gradient, log p, rewards.
    """
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    _, (step,), _ = run(
        tmp_path, flags(max_steps=1, batch_size=99, val_ratio=0, beta=0.7, sft_weight=0.3)
    )
    start = tmp_path / "startFalse"
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(start),
        AutoTokenizer.from_pretrained(start),
    )

    def log_p(messages):
        ids, is_target = (torch.tensor(x) for x in encode_conversation(tokenizer, messages))
        found = model(ids[None, :-1]).logits[0].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        return found[is_target[1:]]

    sides = [(log_p(row["chosen"]), log_p(row["rejected"])) for row in rows]
    margins = torch.stack([chosen.sum() - rejected.sum() for chosen, rejected in sides])
    nll = -torch.stack([chosen.mean() for chosen, _ in sides])
    loss = (-torch.nn.functional.logsigmoid(0.7 * (margins - margins.detach())) + 0.3 * nll).mean()
    loss.backward()
    norm = torch.nn.utils.get_total_norm([x.grad for x in model.parameters()])
    assert step["loss"] == pytest.approx(loss.item(), rel=1e-5) and step[
        "grad_norm"
    ] == pytest.approx(norm.item(), rel=1e-4)
    assert step["log_probs/chosen"] == pytest.approx(
        sum(chosen.sum().item() for chosen, _ in sides) / len(rows), rel=1e-5
    )
    likelier = sum(bool(chosen.sum() > rejected.sum()) for chosen, rejected in sides) / len(rows)
    assert step["log_probs/accuracies"] == pytest.approx(likelier) and 0 < likelier < 1


@pytest.mark.parametrize(
    "options", [{"moe": True}, {"loss_type": "kto", "undesirable_weight": 0.1}]
)
def test_the_update_does_not_depend_on_how_the_batch_is_cut(options, flags, tmp_path):
    results = []
    for batch_size, accumulation_steps in ((12, 1), (4, 3), (3, 4)):
        save_dir = tmp_path / f"{batch_size}"
        weights, steps, _ = run(
            save_dir,
            flags(
                **options,
                save_dir=save_dir / "out",
                max_steps=2,
                val_ratio=0,
                batch_size=batch_size,
                accumulation_steps=accumulation_steps,
            ),
        )
        results.append((weights, steps))
    for weights, steps in results[1:]:
        for row, first in zip(steps, results[0][1]):
            for name in (
                "loss",
                "grad_norm",
                "rewards/margins",
                "rewards/accuracies",
                "log_probs/chosen",
                "targets",
            ):
                assert row[name] == pytest.approx(first[name], rel=2e-4, abs=2e-5), name
        assert_same(weights, results[0][0], rtol=1e-4, atol=2e-5)
    if "loss_type" in options:
        assert results[0][1][1]["kl"] > 1e-3  # after one update there is something to estimate


@pytest.mark.parametrize("loss_type", ["sigmoid", "kto"])
def test_the_reference_is_the_same_cached_and_on_the_fly(loss_type, flags, tmp_path):
    results = [
        run(
            tmp_path / reference,
            flags(
                save_dir=tmp_path / reference / "out",
                reference=reference,
                loss_type=loss_type,
                max_steps=4,
            ),
        )
        for reference in ("cached", "on_the_fly")
    ]
    assert_same(results[0][0], results[1][0], rtol=1e-4, atol=2e-5)
    for ours, theirs in zip(results[0][1], results[1][1]):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    assert results[0][1][-1]["rewards/margins"] > 0.1


def test_cached_log_probs_are_of_these_weights_and_this_data(flags, tmp_path, monkeypatch):
    made, compute = [], Reference.compute
    monkeypatch.setattr(Reference, "compute", lambda *args: made.append(args[-1]) or compute(*args))
    train_dpo.main(flags(max_steps=1))
    # of the training rows and of the held-out ones
    assert len(made) == 2 and all(path.is_file() for path in made)
    train_dpo.main([*flags(max_steps=1, learning_rate=1e-4), "--overwrite"])
    train_dpo.main(flags(max_steps=1, loss_type="simpo", save_weight="simpo"))
    assert len(made) == 2
    train_dpo.main(
        flags(max_steps=1, from_weight=tmp_path / "out" / "dpo_32x2", save_weight="again")
    )
    write_pairs(tmp_path / "pairs.jsonl", 61)
    train_dpo.main(flags(max_steps=1, save_weight="more"))
    assert len(set(made)) == 6


def test_an_interrupted_run_resumes_bit_for_bit(flags, tmp_path):
    options = {"loss_type": "kto", "moe": True, "num_workers": 2}
    whole = run(tmp_path / "whole", flags(**options, save_dir=tmp_path / "whole" / "out"))
    interrupt(train_dpo, flags(**options))
    resumed = run(tmp_path, [*flags(**options), "--from_resume"])
    assert_same(resumed[0], whole[0])
    assert [row["loss"] for row in resumed[1]] == [row["loss"] for row in whole[1]]
    assert [row["val_loss/held_out"] for row in resumed[2]] == [
        row["val_loss/held_out"] for row in whole[2]
    ]


def test_a_run_cannot_be_resumed_with_another_reference(flags, tmp_path):
    train_dpo.main(flags(max_steps=1))
    with pytest.raises(ValueError, match="--from_weight"):
        train_dpo.main(
            [*flags(max_steps=1, from_weight=tmp_path / "out" / "dpo_32x2"), "--from_resume"]
        )
    write_start(tmp_path / "startFalse", seed=2)  # the same name with other weights
    with pytest.raises(ValueError, match="the data"):
        train_dpo.main([*flags(max_steps=1), "--from_resume"])


def test_two_ranks_learn_what_one_learns(flags, tmp_path):
    """Of an epoch with an odd number of rows, whose last step leaves the second rank nothing."""
    write_pairs(tmp_path / "pairs.jsonl", 18)
    assert last_step_rows(tmp_path, 4) == 1
    options = {
        "loss_type": "kto",
        "moe": True,
        "max_steps": None,
        "epochs": 1,
        "val_ratio": 0,
        "learning_rate": 1e-3,
    }
    alone = run(
        tmp_path / "alone",
        flags(**options, accumulation_steps=2, save_dir=tmp_path / "alone" / "out"),
    )
    run_ranks(2, "dpo", flags(**options, save_dir=tmp_path / "two" / "out"))
    folder = next((tmp_path / "two" / "out").iterdir())
    assert_same(load_file(folder / "model.safetensors"), alone[0], rtol=1e-3, atol=2e-5)
    rows = read_metrics(folder / "metrics.jsonl")
    for ours, theirs in zip([row for row in rows if "loss" in row], alone[1], strict=True):
        for name in ("loss", "grad_norm", "rewards/margins", "rewards/accuracies", "targets"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-4), name


def test_every_loss_widens_the_margin(flags, tmp_path):
    for loss_type in ("robust", "ipo", "simpo", "orpo", "kto"):
        extra = {"label_smoothing": 0.1} if loss_type == "robust" else {}
        options = dict(
            loss_type=loss_type, save_weight=loss_type, max_steps=5, val_ratio=0, **extra
        )
        _, steps, _ = run(tmp_path, flags(**options), loss_type)
        assert steps[-1]["loss"] < steps[0]["loss"], loss_type
        assert steps[-1]["rewards/margins"] > steps[0]["rewards/margins"] + 0.01, loss_type


def test_kto_learns_from_single_completions(flags, tmp_path, monkeypatch):
    labels = []
    monkeypatch.setattr("matplotlib.axes.Axes.set_ylabel", lambda axes, label: labels.append(label))
    rows = [
        {
            "conversations": talk(f"What is {i}?", "Gladly! It is." if i % 3 else "No"),
            "label": i % 3 > 0,
        }
        for i in range(60)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, steps, validations = run(tmp_path, flags(loss_type="kto", max_steps=12))
    assert steps[0]["loss"] == pytest.approx(0.5, abs=1e-4) and steps[-1]["loss"] < 0.45
    assert (
        "rewards/accuracies" not in steps[0]
        and validations[-1]["val_rewards/margins/held_out"] > 0.5
    )
    assert labels == ["training loss", "margin of the held-out rewards"]  # of the curve


def test_a_learning_rate_that_moves_nothing_is_said(flags, tmp_path, capsys):
    train_dpo.main(flags(learning_rate=1e-8, max_steps=12))
    assert (
        "warning: after 10 of 12 steps the rewards' margin is still about 0"
        in capsys.readouterr().out
    )
    train_dpo.main(flags(learning_rate=1e-8, max_steps=3, loss_type="kto", save_weight="short"))
    assert (
        "warning: after 3 of 3 steps the rewards' margin is still about 0"
        in capsys.readouterr().out
    )
    for max_steps in (1, 3, 12):  # one step says nothing: its margin is from before the update
        train_dpo.main(
            flags(max_steps=max_steps, learning_rate=1e-2, save_weight=f"fast{max_steps}")
        )
        assert "where it began" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "wrong, message",
    [
        (
            {"loss_type": "simpo", "reference": "cached"},
            "--loss_type simpo does not use --reference",
        ),
        (
            {"loss_type": "orpo", "sft_weight": 1, "gamma": 2},
            "--loss_type orpo does not use --gamma, --sft_weight",
        ),
        ({"gamma": 1}, "--loss_type sigmoid does not use --gamma"),
        ({"desirable_weight": 2}, "does not use --desirable_weight"),
        (
            {"loss_type": "kto", "label_smoothing": 0.1},
            "--loss_type kto does not use --label_smoothing",
        ),
        ({"loss_type": "robust"}, "--loss_type robust needs one above 0"),
        ({"label_smoothing": 0.5}, "below 0.5"),
        ({"beta": 0}, "--beta 0.0: give more than 0"),
        ({"sft_weight": -1}, "--sft_weight -1.0: give 0 or more"),
        ({"dropout": 0.1}, "--dropout would add noise"),
        ({"from_weight": "none"}, "--from_weight none with --loss_type s"),
    ],
)
def test_flags_without_effect_are_refused(wrong, message, flags, capsys):
    with pytest.raises(SystemExit):
        train_dpo.main(flags(**wrong))
    assert message in capsys.readouterr().err


def test_single_completions_need_kto(flags, tmp_path):
    (tmp_path / "pairs.jsonl").write_text(
        json.dumps({"conversations": talk("a", "b"), "label": True}) + "\n"
    )
    with pytest.raises(ValueError, match=r"pairs.jsonl:1: .*only --loss_type kto learns from it"):
        train_dpo.main(flags())

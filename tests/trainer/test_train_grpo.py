"""GRPO and its family from end to end: two updates by hand, every way to cut a step, resumption,
what is learned, mistakes.
"""

import json
import math
import shutil
import signal

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from dataset.chat.format import encode_prompt
from tests.helpers.prompt_rows import (
    LONGEST,
    MOE,
    assert_close,
    assert_same_end,
    folder_of,
    held_out_rewards,
    log_probs_of,
    logits_of,
    policy_flags,
    record_samples,
    record_steps,
    steps,
    training_state,
    transcripts,
    worth,
    write_policy,
    write_prompts,
)
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import assert_same, interrupt, metrics, weights
from trainer import train_grpo
from trainer.runtime.guard import NonFiniteGuard

CLIPS = {
    "grpo": (0.2, 0.2),
    "dr_grpo": (0.2, 0.2),
    "dapo": (0.2, 0.28),
    "cispo": (math.inf, 4.0),
    "gspo": (3e-4, 4e-4),
}


@pytest.fixture(autouse=True)
def no_curve(monkeypatch):
    monkeypatch.setattr("trainer.runtime.loop.plot_curve", lambda folder: None)


@pytest.fixture
def flags(tmp_path):
    """flags(**changes) of a short run; moe=True starts from a mixture of experts, flat: number of
    rows that teach nothing.
    """

    def make(*switches, moe=False, flat=0, **changes):
        start = tmp_path / f"start{moe}"
        write_prompts(tmp_path / "prompts.jsonl", flat=flat)
        if not start.exists():
            write_policy(start, **(MOE if moe else {}))
        return [*policy_flags(tmp_path, start, **changes), *switches]

    return make


def advantage(sample, group, loss_type):
    """Of a completion against the others of its prompt."""
    values = torch.tensor([worth(one.row, one.text) for one in group], dtype=torch.float64)
    centered = worth(sample.row, sample.text) - values.mean()
    return (centered if loss_type == "dr_grpo" else centered / (values.std() + 1e-4)).item()


def loss_by_hand(loss_type, completions, beta):
    """(loss, metrics) of (A, log p, log p_old, log p_ref, entropies) of each completion."""
    num_tokens, (low, high) = sum(len(now) for _, now, *_ in completions), CLIPS[loss_type]
    loss, kl, approx_kl, entropy, clipped = 0, 0, 0, 0, 0
    for A, now, old, ref, entropies in completions:
        ratio = (now - old).exp()
        if loss_type == "gspo":
            ratio = (now - old).mean().exp().repeat(len(now))
        if loss_type == "cispo":
            values = ratio.detach().clamp(max=5) * A * now
        else:
            values = torch.stack([torch.min(r * A, r.clamp(1 - low, 1 + high) * A) for r in ratio])
        k3 = (ref - now).exp() - 1 - (ref - now)
        weight = {
            "dapo": 1 / num_tokens,
            "cispo": 1 / num_tokens,
            "dr_grpo": 1 / (LONGEST * len(completions)),
        }.get(loss_type, 1 / (len(now) * len(completions)))
        loss = loss + weight * (beta * k3 - values).sum()
        outside = (
            (ratio > 1 + high) if A > 0 or loss_type == "cispo" else (ratio < 1 - low) & (A < 0)
        )
        kl += k3.sum().item()
        approx_kl += ((now - old).exp() - 1 - (now - old)).sum().item()
        entropy += entropies.sum().item()
        clipped += int(outside.sum())
    return loss, {
        "loss": loss.item(),
        "kl": kl / num_tokens,
        "approx_kl": approx_kl / num_tokens,
        "entropy": entropy / num_tokens,
        "clip_fraction": clipped / num_tokens,
    }


@pytest.mark.parametrize(
    "loss_type, beta, temperature",
    [
        ("grpo", 0.3, 0.7),
        ("dr_grpo", 0, 1.0),
        ("dapo", 0.1, 1.0),
        ("cispo", 0, 0.7),
        ("gspo", 0, 1.0),
    ],
)
def test_two_updates_are_those_of_transformers_network(
    loss_type, beta, temperature, flags, tmp_path, monkeypatch
):
    """In float64, completion by completion. At the first update all ratios are 1; at the second
    some are clipped.
    """
    rollouts = record_samples(monkeypatch, train_grpo)
    train_grpo.main(
        flags(
            loss_type=loss_type,
            beta=beta,
            temperature=temperature,
            max_steps=1,
            update_epochs=2,
            num_generations=8,
            grad_clip=0.5,
            val_ratio=0,
        )
    )
    (row,) = steps(folder_of(tmp_path / "out"))
    every = [one for rollout in rollouts for one in rollout]
    groups = [every[i : i + 8] for i in range(0, len(every), 8)]
    groups = [group for group in groups if len({worth(one.row, one.text) for one in group}) > 1]
    samples = [one for group in groups for one in group]
    assert len({len(one.tokens) for one in samples}) > 1
    assert {one.is_complete for one in samples} == {True, False}
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "startFalse").double() for _ in range(2)
    )
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0
    )
    advantages = [advantage(one, group, loss_type) for group in groups for one in group]
    with torch.no_grad():
        ref = [log_probs_of(logits_of(reference, one, temperature), one) for one in samples]
    found = []
    for _ in range(2):
        completions = []
        for A, one, theirs in zip(advantages, samples, ref):
            logits = logits_of(policy, one, temperature)
            entropies = torch.distributions.Categorical(logits=logits.detach()).entropy()
            completions.append((A, log_probs_of(logits, one), theirs, theirs, entropies))
        loss, numbers = loss_by_hand(loss_type, completions, beta)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 0.5).item()
        optimizer.step()
        found.append(numbers)
    expected = {
        name: (found[0][name] + found[1][name]) / 2 for name in found[0] if beta or name != "kl"
    }
    assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert (
        row["grad_norm"] == pytest.approx(norm, rel=2e-3)
        and row["clip_fraction"] > 0.001
        and norm > 0.5
    )
    assert row["targets"] == 2 * sum(len(one.tokens) for one in samples)
    rewards = [worth(one.row, one.text) for one in every]
    assert row["reward/total"] == pytest.approx(sum(rewards) / len(rewards))
    assert_close(weights(folder_of(tmp_path / "out")), policy.float().state_dict(), 1e-2, 2e-5)


def record_experience(monkeypatch):
    """A list that gets (the samples that are trained on, their experience) of every step."""
    seen, minibatches = [], train_grpo.minibatches

    def note(run, samples, experience, pad_id, step):
        seen.append((samples, experience))
        return minibatches(run, samples, experience, pad_id, step)

    monkeypatch.setattr(train_grpo, "minibatches", note)
    return seen


@pytest.mark.parametrize("scale", ["batch", "none"])
def test_rewards_are_scaled_as_asked(scale, flags, monkeypatch):
    """The advantages that reach the loss, against plain numbers: --scale_rewards overrides that of
    --loss_type.
    """
    seen = record_experience(monkeypatch)
    train_grpo.main(flags(scale_rewards=scale, max_steps=1, val_ratio=0, num_generations=2))
    ((samples, experience),) = seen
    totals = torch.tensor([worth(one.row, one.text) for one in samples]).view(-1, 2)
    for group, sample, values in zip(
        totals.repeat_interleave(2, 0), samples, experience["advantages"], strict=True
    ):
        by = {"batch": totals.std() + 1e-4, "none": 1}[scale]
        expected = (worth(sample.row, sample.text) - group.mean()) / by
        torch.testing.assert_close(values, expected.repeat(len(sample.tokens)))


@pytest.mark.parametrize(
    "options",
    [
        {"moe": True, "beta": 0.1},
        {"num_minibatches": 2, "loss_type": "gspo", "gradient_checkpointing": 1},
    ],
)
def test_the_update_does_not_depend_on_how_a_step_is_cut(options, flags, tmp_path):
    results = []
    for batch_size in (99, 3, 1):
        train_grpo.main(
            flags(
                **options,
                save_dir=tmp_path / f"{batch_size}",
                batch_size=batch_size,
                max_steps=2,
                val_ratio=0,
            )
        )
        results.append(folder_of(tmp_path / f"{batch_size}"))
    for folder in results[1:]:
        assert_close(weights(folder), weights(results[0]))
        for ours, theirs in zip(steps(folder), steps(results[0]), strict=True):
            for name in ("loss", "grad_norm", "approx_kl", "entropy", "reward/total", "targets"):
                assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize(
    "options",
    [
        {"moe": True, "num_prompts": 3, "beta": 0.1, "resample": 1, "flat": 8},
        {"num_prompts": 1, "num_generations": 2, "lora_rank": 4},
    ],
)
def test_two_ranks_learn_what_one_learns(options, flags, tmp_path):
    """An odd number of prompts; and a step of a single prompt, which leaves the second rank nothing
    to sample or to learn.
    """
    options = {**options, "max_steps": 2}
    train_grpo.main(flags(**options, save_dir=tmp_path / "one"))
    run_ranks(2, "grpo", flags(**options, save_dir=tmp_path / "two"))
    one, two = (folder_of(tmp_path / name) for name in ("one", "two"))
    names = {
        "loss",
        "grad_norm",
        "approx_kl",
        "kl",
        "reward/total",
        "frac_reward_zero_std",
        "targets",
        "val_reward/total/held_out",
        "expert_load/max",
        "completions/finished_ratio",
    }
    for ours, theirs in zip(metrics(two), metrics(one), strict=True):
        assert ours.keys() == theirs.keys()
        for name in names & ours.keys():
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), name
    assert [(x["step"], x["text"]) for x in transcripts(two)] == [
        (x["step"], x["text"]) for x in transcripts(one)
    ]
    if "lora_rank" not in options:
        assert_close(weights(two), weights(one), 5e-4, 2e-6)
    else:
        a, b = (training_state(folder, 2)["optimizer"]["state"] for folder in (one, two))
        assert a and all(
            torch.allclose(a[i]["exp_avg"], b[i]["exp_avg"], rtol=1e-3, atol=1e-6) for i in a
        )


def cut_in_the_seventh_step(patch, options, flags):
    """As by a failure: the last checkpoint is that of the fourth step."""
    interrupt(train_grpo, flags(**options))
    return 4


def signal_in_the_sixth_step(patch, options, flags):
    """The step is finished and saved."""
    sample_groups = train_grpo.sample_groups

    def sample(run, sampler, dataset, items, step, attempt):
        if step == 5:
            signal.raise_signal(signal.SIGTERM)
        return sample_groups(run, sampler, dataset, items, step, attempt)

    patch.setattr(train_grpo, "sample_groups", sample)
    with pytest.raises(SystemExit) as end:
        train_grpo.main(flags(**options))
    assert end.value.code == 128 + signal.SIGTERM
    return 6


def test_a_run_resumes_with_another_number_of_ranks(flags, tmp_path):
    options = {"num_prompts": 3, "max_steps": 2, "save_interval": 1}
    train_grpo.main(flags(**options, save_dir=tmp_path / "one"))
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    one, two = (folder_of(tmp_path / name) for name in ("one", "two"))
    shutil.rmtree(two / "checkpoints" / "step-2")
    run_ranks(2, "grpo", flags("--from_resume", **options, save_dir=tmp_path / "two"))
    assert (two / "checkpoints" / "step-2").is_dir()
    assert_close(weights(two), weights(one), 5e-4, 2e-6)
    assert [(x["step"], x["text"]) for x in transcripts(two)] == [
        (x["step"], x["text"]) for x in transcripts(one)
    ]


@pytest.mark.parametrize(
    "stop, options",
    [
        (
            cut_in_the_seventh_step,
            {"num_minibatches": 2, "update_epochs": 2, "beta": 0.1, "num_workers": 2, "moe": True},
        ),
        (signal_in_the_sixth_step, {"loss_type": "dapo", "dtype": "bfloat16", "flat": 10}),
        (cut_in_the_seventh_step, {"resample": 0, "flat": 18}),
        (cut_in_the_seventh_step, {"lora_rank": 4, "optimizer": "muon"}),
    ],
)
def test_an_interrupted_run_resumes_bit_for_bit(stop, options, flags, tmp_path, monkeypatch):
    train_grpo.main(flags(**options, save_dir=tmp_path / "whole"))
    with monkeypatch.context() as patch:
        saved = stop(patch, options, flags)
    folder, whole = folder_of(tmp_path / "out"), folder_of(tmp_path / "whole")
    assert max(row["step"] for row in transcripts(folder)) == 6
    with open(folder / "transcripts.jsonl", "a") as file:
        file.write('{"step": 7, "te')  # of a process that was killed while it wrote
    again = record_steps(monkeypatch, train_grpo)
    train_grpo.main(flags("--from_resume", **options))
    assert again == list(range(saved, 8))
    assert_same_end(folder, whole)
    fractions = [row["frac_reward_zero_std"] for row in steps(whole)]
    assert len(fractions) == 8
    if options.get("flat") == 18:
        assert 1 in fractions and min(fractions) < 1  # steps with an update and without
    elif options.get("flat") == 10:
        assert 0 < max(fractions) < 1


def test_low_rank_adapters_are_all_that_moves(flags, tmp_path, monkeypatch):
    """Completions are sampled from the network with them, and PEFT reads the same network."""
    command = flags(lora_rank=4, learning_rate=1e-2, beta=0.01, val_ratio=0, save_interval=7)
    rollouts = record_samples(monkeypatch, train_grpo)
    before = {path.name: path.read_bytes() for path in (tmp_path / "startFalse").iterdir()}
    train_grpo.main(command)
    folder = folder_of(tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "startFalse").iterdir()} == before
    assert (folder / "adapter_model.safetensors").is_file() and not list(
        folder.rglob("model.safetensors")
    )
    rows = steps(folder)
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-6) and rows[-1]["kl"] > 0.01
    assert all(
        row["approx_kl"] < 1e-6 for row in rows
    )  # the sampler's probabilities are those of the network in training
    assert rows[-1]["reward/total"] > rows[0]["reward/total"] + 0.1
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "startFalse")
    peft = PeftModel.from_pretrained(base, folder / "checkpoints" / "step-7").eval()
    for sample in rollouts[7]:  # of the eighth step, by the network after the seventh
        torch.testing.assert_close(
            sample.old_log_probs,
            log_probs_of(logits_of(peft, sample), sample).detach(),
            atol=1e-3,
            rtol=1e-3,
        )


@pytest.mark.parametrize("loss_type, dtype", [("grpo", "float32"), ("cispo", "bfloat16")])
def test_what_is_rewarded_is_learned(loss_type, dtype, flags, tmp_path):
    """A bandit with a known optimum: eight letters up to m earn 1, any letters about a half."""
    train_grpo.main(flags(loss_type=loss_type, dtype=dtype, max_steps=15, val_interval=15))
    folder = folder_of(tmp_path / "out")
    rewards = [row["reward/total"] for row in steps(folder)]
    assert sum(rewards[:2]) / 2 < 0.6 and sum(rewards[-3:]) / 3 > 0.9
    first, last = held_out_rewards(folder)
    assert first < 0.8 and last > 0.95
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model).__name__ == "Qwen3ForCausalLM" and model.dtype == torch.float32


def test_without_spread_nothing_is_learned(flags, tmp_path):
    options = dict(flat=20, max_steps=3, json=tmp_path / "metrics.json")
    train_grpo.main(flags(**options))
    folder = folder_of(tmp_path / "out")
    assert_same(weights(folder), weights(tmp_path / "startFalse"))
    for row in steps(folder):
        assert (
            row["frac_reward_zero_std"],
            row["loss"],
            row["grad_norm"],
            row["targets"],
            row["reward/std"],
        ) == (1, 0, 0, 0, 0)
        assert row["reward/total"] == 0.5
    assert (
        len(transcripts(folder)) == 3 * 4
        and json.loads((tmp_path / "metrics.json").read_text())["frac_reward_zero_std"] == 1
    )


def test_other_prompts_are_drawn_in_place_of_groups_without_spread(flags, tmp_path, monkeypatch):
    rollouts, seen = record_samples(monkeypatch, train_grpo), record_experience(monkeypatch)
    options = dict(flat=10, max_steps=1, num_prompts=8, val_ratio=0)
    train_grpo.main(flags(**options, resample=3))
    train_grpo.main(flags(**options, save_weight="never"))
    (first, *more), never = rollouts[:-1], rollouts[-1]
    assert [one.tokens for one in never] == [one.tokens for one in first] and len(more) > 0
    assert {one.item for rollout in more for one in rollout} - {one.item for one in first}
    missing = 8
    for rollout in (first, *more):
        groups = [rollout[i : i + 4] for i in range(0, len(rollout), 4)]
        assert len(groups) == missing
        missing -= sum(len({worth(one.row, one.text) for one in group}) > 1 for group in groups)
    assert missing < 8 - sum(not one.row["flat"] for one in first[::4])
    (trained, _), (trained_never, _) = seen
    assert len(trained) == 4 * (8 - missing)
    assert not any(one.row["flat"] for one in trained + trained_never)
    fractions = {
        folder.name: steps(folder)[0]["frac_reward_zero_std"]
        for folder in (tmp_path / "out").iterdir()
    }
    num_sampled = sum(map(len, rollouts[:-1]))
    assert fractions == {
        "grpo_32x2": pytest.approx(1 - len(trained) / num_sampled),
        "never_32x2": 1 - len(trained_never) / 32,
    }


def test_transcripts_and_held_out_metrics_are_of_the_samples(flags, tmp_path, monkeypatch):
    rollouts = record_samples(monkeypatch, train_grpo)
    train_grpo.main(
        flags(max_steps=5, log_interval=2, num_transcripts=3, val_interval=10, learning_rate=1e-5)
    )
    folder = folder_of(tmp_path / "out")
    rows = transcripts(folder)
    assert [row["step"] for row in rows] == [2, 2, 2, 4, 4, 4]
    for row in rows:
        sample = next(
            one
            for one in rollouts[row["step"] - 1]
            if one.text == row["text"] and one.item == row["item"]
        )
        assert row["rewards"]["total"] == pytest.approx(worth(sample.row, row["text"]))
        assert row["messages"] == [
            *sample.row["conversations"],
            {"role": "assistant", "content": row["text"]},
        ]
    for step, found in ((2, rows[:3]), (4, rows[3:])):
        worst, middle, best = (row["rewards"]["total"] for row in found)
        every = [one.rewards["total"] for one in rollouts[step - 1]]
        assert min(every) == worst < middle < best == max(every)
    train_grpo.main(flags(max_steps=1, num_transcripts=0, save_weight="none"))
    assert not (tmp_path / "out" / "none_32x2" / "transcripts.jsonl").exists()

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "startFalse")
    prompts = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    asked = {json.dumps(one.row) for rollout in rollouts for one in rollout}
    held_out = [row for row in prompts if json.dumps(row) not in asked]
    assert len(held_out) == 4
    # the learning rate is small: the completions still differ in worth
    for path, found in zip((tmp_path / "startFalse", folder), held_out_rewards(folder)):
        network, values = AutoModelForCausalLM.from_pretrained(path), []
        for row in held_out:
            ids = torch.tensor([encode_prompt(tokenizer, row["conversations"])])
            out = network.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=LONGEST, do_sample=False
            )
            values.append(
                worth(row, tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
            )
        assert found == pytest.approx(sum(values) / 4) and len(set(values)) > 1


def test_a_run_that_goes_back_takes_back_its_transcripts(flags, tmp_path, monkeypatch):
    """Losses that are not finite from the sixth step on, until the learning rate is halved."""
    begun, backward = record_steps(monkeypatch, train_grpo), train_grpo.Run.backward
    went_back, go_back = [], NonFiniteGuard.go_back

    def poisoned(run, loss):
        backward(run, loss * float("nan") if begun[-1] >= 5 and not went_back else loss)

    monkeypatch.setattr(train_grpo.Run, "backward", poisoned)
    monkeypatch.setattr(
        NonFiniteGuard, "go_back", lambda guard: went_back.append(True) or go_back(guard)
    )
    train_grpo.main(flags(max_bad_steps=2, num_transcripts=1))
    assert begun == [0, 1, 2, 3, 4, 5, 6, 4, 5, 6, 7]
    folder = folder_of(tmp_path / "out")
    assert [row["step"] for row in steps(folder)] == list(range(1, 9))
    assert [row["step"] for row in transcripts(folder)] == list(range(1, 9))


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(num_generations=1), "--num_generations 1: a completion is compared with its group"),
        (dict(loss_type="cispo", epsilon=0.1), "--epsilon has no effect with --loss_type cispo"),
        (dict(epsilon_high=0), "--epsilon_high 0.0: give more than 0"),
        (dict(epsilon=-1), "--epsilon -1.0: give more than 0"),
        (dict(resample=-1), "--resample -1: give 0 or more"),
        (dict(kl_estimator="k1"), "invalid choice: 'k1'"),
        (dict(loss_type="ppo"), "invalid choice: 'ppo'"),
    ],
)
def test_flags_that_make_no_sense_are_refused(wrong, message, flags, capsys):
    with pytest.raises(SystemExit):
        train_grpo.main(flags(**wrong))
    assert message in capsys.readouterr().err


def test_a_loss_type_decides_its_flags_unless_they_are_given(flags):
    def parse(**changes):
        args = train_grpo.parse_args(train_grpo.GRPOArgs, flags(**changes))
        return tuple(getattr(args, name) for name in train_grpo.FIELDS)

    assert parse() == (0.2, 0.2, "group", "sequence", 0)
    assert parse(loss_type="dr_grpo") == (0.2, 0.2, "none", "constant", 0)
    assert parse(loss_type="dapo") == (0.2, 0.28, "group", "token", 2)
    assert parse(loss_type="cispo") == (1.0, 4.0, "group", "token", 0)
    assert parse(loss_type="gspo", resample=3) == (3e-4, 4e-4, "group", "sequence", 3)
    given = dict(resample=0, scale_rewards="batch", epsilon_high=0.5)
    assert parse(loss_type="dapo", **given) == (0.2, 0.5, "batch", "token", 0)


def test_older_names_of_the_flags_are_known(flags):
    old = dict(clip_low=0.1, clip_high=0.5, scale="none", weighting="token")
    args = train_grpo.parse_args(train_grpo.GRPOArgs, flags(**old))
    found = tuple(getattr(args, name) for name in train_grpo.FIELDS)
    assert found == (0.1, 0.5, "none", "token", 0)


def test_a_row_that_cannot_be_judged_is_named(flags, tmp_path):
    command = flags(rewards=None, val_ratio=0)
    (tmp_path / "prompts.jsonl").write_text(
        '{"conversations": [{"role": "user", "content": "1"}]}\n' * 3
    )
    with pytest.raises(
        ValueError,
        match=r'prompts.jsonl:1: neither "answer" nor "gt" among the keys .*or --rewards without',
    ):
        train_grpo.main(command)


def test_a_run_cannot_be_resumed_from_another_start_or_rewards(flags, tmp_path):
    train_grpo.main(flags(max_steps=1))
    with pytest.raises(ValueError, match=r"--rewards .* -> "):
        train_grpo.main(flags("--from_resume", max_steps=1, rewards="length=1"))
    write_policy(tmp_path / "startFalse", seed=2)
    with pytest.raises(ValueError, match="the data"):
        train_grpo.main(flags("--from_resume", max_steps=1))

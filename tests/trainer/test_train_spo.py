"""SPO from end to end: the first update and the values of the next ones by hand, ranks, resumption,
adapters, wrong flags.
"""

import math

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.helpers import runs
from tests.helpers.prompt_rows import (
    MOE,
    folder_of,
    log_probs_of,
    logits_of,
    policy_flags,
    record_samples,
    training_state,
    transcripts,
    worth,
    write_policy,
    write_prompts,
)
from tests.helpers.ranks import run_ranks
from trainer import train_spo
from trainer.rl.rollout import SingleTurn, draw_seed
from trainer.rl.value_tracker import ValueTracker
from trainer.runtime.arguments import parse_args


@pytest.fixture(autouse=True)
def no_curve(monkeypatch):
    monkeypatch.setattr("trainer.runtime.loop.plot_curve", lambda folder: None)


@pytest.fixture
def flags(tmp_path):
    """flags(**changes) of a short run; moe=True starts from a mixture of experts."""
    write_prompts(tmp_path / "prompts.jsonl", 20, flat=4)
    starts = {
        moe: write_policy(tmp_path / f"start{moe}", 10, **(MOE if moe else {}))
        for moe in (False, True)
    }
    return lambda moe=False, **changes: policy_flags(
        tmp_path,
        starts[moe],
        **{"num_generations": None, "initial_completions": 2, "num_prompts": 6, **changes},
    )


def metrics(save_dir):
    """The lines of metrics.jsonl without the clock: (of training, of validation)."""
    rows = runs.metrics(folder_of(save_dir))
    return [row for row in rows if "loss" in row], [
        row for row in rows if "val_reward/total/held_out" in row
    ]


def state(save_dir, step):
    """The stream in a checkpoint: alpha, beta, and the columns of the last samples."""
    extra = training_state(folder_of(save_dir), step)["extra"]
    return {**extra["tracker"], **extra["last"]}


def record_first_samples(monkeypatch):
    """A list that gets the Samples by which the values begin."""
    found, begin_values = [], train_spo.begin_values

    class Recorded(SingleTurn):
        def __call__(self, dataset, items, seeds, temperature=None):
            found.extend(samples := super().__call__(dataset, items, seeds, temperature))
            return samples

    def begin(run, stream, sampler, dataset, rewards):
        begin_values(run, stream, Recorded(run, sampler.rollout), dataset, rewards)

    monkeypatch.setattr(train_spo, "begin_values", begin)
    return found


@pytest.mark.parametrize("initial_completions", [0, 3])
def test_the_first_update_is_that_of_plain_forwards(
    initial_completions, flags, tmp_path, monkeypatch
):
    """Values from the first completions, advantages, loss, gradient and entropy, with transformers'
    own network.

    The log-probabilities of the rollout are shifted, as if another policy had sampled: some ratios
    are clipped.
    """
    first, sample_groups = record_first_samples(monkeypatch), train_spo.sample_groups

    def shifted(*args):
        samples = sample_groups(*args)
        for one in samples:
            one.log_probs = [x + 0.5 * math.sin(3 * i) for i, x in enumerate(one.log_probs)]
        return samples

    monkeypatch.setattr(train_spo, "sample_groups", shifted)
    rollouts = record_samples(monkeypatch, train_spo)
    train_spo.main(
        flags(
            initial_completions=initial_completions,
            val_ratio=0,
            max_steps=1,
            temperature=0.8,
            num_prompts=12,
        )
    )
    (step,), _ = metrics(tmp_path / "out")
    expected = dict.fromkeys(range(20), 0.5)
    if initial_completions:
        firsts = [[one for one in first if one.item == item] for item in range(20)]
        # each is drawn with its own seed
        assert len(first) == 60 and len({tuple(one.tokens) for one in first}) > 40
        expected = {
            item: (sum(worth(one.row, one.text) for one in mine) + 0.5) / 4
            for item, mine in enumerate(firsts)
        }
        assert all(len(mine) == 3 for mine in firsts) and len(set(expected.values())) > 5
    assert bool(first) == bool(initial_completions)

    (samples,) = rollouts
    surplus = torch.tensor(
        [worth(one.row, one.text) - expected[one.item] for one in samples], dtype=torch.float64
    )
    advantages = (surplus - surplus.mean()) / (surplus.var() + 1e-8).sqrt()
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "startFalse")
    terms, entropies, clipped = [], [], []
    for sample, advantage in zip(samples, advantages.tolist()):
        logits = logits_of(network, sample, 0.8)
        ratio = (log_probs_of(logits, sample) - torch.tensor(sample.log_probs)).exp()
        terms.append(torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage))
        clipped.append(ratio > 1.28 if advantage > 0 else ratio < 0.8)
        entropies.append(-(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).detach())
    loss = -torch.cat(terms).mean()
    loss.backward()
    norm = torch.nn.utils.get_total_norm([x.grad for x in network.parameters()])
    assert step["loss"] == pytest.approx(loss.item(), rel=1e-4) and step[
        "grad_norm"
    ] == pytest.approx(norm.item(), rel=1e-3)
    assert step["entropy"] == pytest.approx(torch.cat(entropies).mean().item(), rel=1e-5)
    assert step["targets"] == len(torch.cat(terms)) < 12 * 8 and abs(loss.item()) > 1e-3
    assert (
        step["clip_fraction"] == pytest.approx(torch.cat(clipped).float().mean().item())
        and step["clip_fraction"] > 0.1
    )
    for one in samples:  # the same policy as then: as much as can be is remembered
        rest = 0.96 * (8 if initial_completions else 1)
        expected[one.item] = (rest * expected[one.item] + worth(one.row, one.text)) / (rest + 1)
    assert step["value/mean"] == pytest.approx(sum(expected.values()) / 20, abs=1e-5)


def test_values_and_draws_follow_the_run(flags, tmp_path, monkeypatch):
    """Every step: drawn by the values before; forgotten as far as the last sample's
    log-probabilities have moved since.
    """
    first, rollouts = record_first_samples(monkeypatch), record_samples(monkeypatch, train_spo)
    train_spo.main(
        flags(
            val_ratio=0,
            max_steps=5,
            save_interval=1,
            keep=9,
            temperature=0.8,
            learning_rate=1e-5,
            num_prompts=9,
        )
    )
    folder, tracker, last, rhos = folder_of(tmp_path / "out"), ValueTracker(20), {}, []
    tracker.start(
        list(range(20)), torch.tensor([worth(one.row, one.text) for one in first]).view(20, 2)
    )
    for one in first:
        last[one.item] = one
    for done, samples in enumerate(rollouts):
        assert [one.item for one in samples] == tracker.draw(9, draw_seed(42, done))
        path = folder / "checkpoints" / f"step-{done}" if done else tmp_path / "startFalse"
        network = AutoModelForCausalLM.from_pretrained(path)
        for one in samples:
            with torch.no_grad():
                moved = log_probs_of(logits_of(network, last[one.item], 0.8), last[one.item])
            distance = (moved - torch.tensor(last[one.item].log_probs)).abs().mean().item()
            rhos.append(min(0.96, max(0.875, 2 ** (-distance / 0.06))))
            for name, gain in (
                ("alpha", worth(one.row, one.text)),
                ("beta", 1 - worth(one.row, one.text)),
            ):
                getattr(tracker, name)[one.item] = (
                    rhos[-1] * getattr(tracker, name)[one.item] + gain
                )
            last[one.item] = one
        saved = state(tmp_path / "out", done + 1)
        torch.testing.assert_close(saved["alpha"], tracker.alpha, rtol=2e-4, atol=1e-5)
        torch.testing.assert_close(saved["beta"], tracker.beta, rtol=2e-4, atol=1e-5)
        tracker.alpha, tracker.beta = (
            saved["alpha"],
            saved["beta"],
        )  # the next draw is by the very values
        assert saved["items"].tolist() == list(range(20))
        assert saved["lengths"].tolist() == [len(last[i].tokens) for i in range(20)]
        assert saved["tokens"].tolist() == [token for i in range(20) for token in last[i].tokens]
    assert any(0.875 < rho < 0.96 for rho in rhos) and 0.96 in rhos and 0.875 in rhos


def test_an_interrupted_run_resumes_bit_for_bit(flags, tmp_path, monkeypatch):
    options = dict(
        moe=True, update_epochs=2, num_minibatches=2, beta=0.1, max_steps=7, save_interval=3
    )
    train_spo.main(flags(**options, save_dir=tmp_path / "whole"))
    runs.interrupt(train_spo, flags(**options), 4)
    first = record_first_samples(monkeypatch)
    train_spo.main([*flags(**options), "--from_resume"])
    assert not first  # the values have begun
    assert metrics(tmp_path / "out") == metrics(tmp_path / "whole")
    assert metrics(tmp_path / "out")[0][-1]["kl"] > 1e-4
    ours, theirs = state(tmp_path / "out", 7), state(tmp_path / "whole", 7)
    assert ours.keys() == theirs.keys() and all(
        torch.equal(ours[name], theirs[name]) for name in ours
    )
    ours, theirs = (
        load_file(folder_of(tmp_path / name) / "model.safetensors") for name in ("out", "whole")
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    ours, theirs = (transcripts(folder_of(tmp_path / name)) for name in ("out", "whole"))
    assert ours == theirs and len(ours) == 7 * 4


def test_two_ranks_learn_what_one_learns(flags, tmp_path):
    """Of 7 prompts a step, whose sequences do not make the same number of rows for both."""
    options = dict(max_steps=3, num_prompts=7, batch_size=1, max_seq_len=40, learning_rate=1e-3)
    train_spo.main(flags(**options, save_dir=tmp_path / "alone"))
    run_ranks(2, "spo", flags(**options, save_dir=tmp_path / "two"))
    for mine, theirs in zip(metrics(tmp_path / "two"), metrics(tmp_path / "alone"), strict=True):
        for row, other in zip(mine, theirs, strict=True):
            assert row == pytest.approx(other, rel=2e-3, abs=1e-5)
    for name, expected in state(tmp_path / "alone", 3).items():
        torch.testing.assert_close(state(tmp_path / "two", 3)[name], expected, rtol=1e-3, atol=1e-4)
    ours, theirs = (
        load_file(folder_of(tmp_path / name) / "model.safetensors") for name in ("two", "alone")
    )
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-4)


def test_a_policy_learns_in_fourteen_steps(flags, tmp_path):
    write_prompts(tmp_path / "prompts.jsonl", 20)
    train_spo.main(flags(max_steps=14, num_prompts=16, val_interval=7))
    steps, validations = metrics(tmp_path / "out")
    assert [row["step"] for row in validations] == [0, 7, 14]
    assert (
        validations[0]["val_reward/total/held_out"] + 0.5
        < validations[-1]["val_reward/total/held_out"]
    )
    assert (
        steps[0]["reward/total"] + 0.5 < steps[-1]["reward/total"]
        and steps[0]["value/mean"] + 0.1 < steps[-1]["value/mean"]
    )


def test_an_adapter_samples_and_learns(flags, tmp_path, monkeypatch):
    """PEFT's network of the first checkpoint has the log-probabilities that the second step's
    completions were drawn with.
    """
    rollouts = record_samples(monkeypatch, train_spo)
    before = (tmp_path / "startFalse" / "model.safetensors").read_bytes()
    train_spo.main(
        flags(lora_rank=4, max_steps=2, save_interval=1, learning_rate=3e-2, val_ratio=0)
    )
    folder, base = (
        folder_of(tmp_path / "out"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "startFalse"),
    )
    assert not (folder / "model.safetensors").exists()
    assert (tmp_path / "startFalse" / "model.safetensors").read_bytes() == before
    plain = [log_probs_of(logits_of(base, one), one).detach() for one in rollouts[1]]
    adapted = PeftModel.from_pretrained(base, folder / "checkpoints" / "step-1")
    for sample, other in zip(rollouts[1], plain):
        log_probs = log_probs_of(logits_of(adapted, sample), sample)
        torch.testing.assert_close(log_probs, sample.old_log_probs, rtol=1e-3, atol=1e-3)
        assert (log_probs - other).abs().max() > 5e-3


@pytest.mark.parametrize("initial_completions", [0, 1])
@pytest.mark.parametrize("wrong", [1.5, -0.25])
def test_rewards_that_are_no_fractions_of_a_success_end_the_run(
    wrong, initial_completions, flags, tmp_path
):
    (tmp_path / "reward.py").write_text(f"def early(text, row):\n    return {wrong}\n")
    with pytest.raises(
        ValueError,
        match=rf"a reward of {wrong}: SPO counts .* weights sum to 1, or take train_grpo.py",
    ):
        train_spo.main(flags(initial_completions=initial_completions, max_steps=1))


def test_a_step_of_more_prompts_than_there_are_is_refused_before_any_sample(flags, monkeypatch):
    first = record_first_samples(monkeypatch)
    with pytest.raises(
        ValueError, match=r"--num_prompts 17: a step has different prompts, and there are 16"
    ):
        train_spo.main(flags(num_prompts=17))
    assert not first


@pytest.mark.parametrize(
    "rewards", [["answer=1", "length=0.1"], ["answer=-1"], ["answer=1", "format=0.2"]]
)
def test_rewards_beyond_a_success_are_refused_before_any_sample(rewards, flags, capsys):
    with pytest.raises(SystemExit):
        train_spo.main([*flags(rewards=None), "--rewards", *rewards])
    assert "fractions of a success, from 0 to 1. Give parts" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"initial_completions": -1}, "--initial_completions -1: give 0 or more"),
        ({"epsilon": 0}, "--epsilon 0.0: give more than 0"),
        ({"epsilon_high": -0.1}, "--epsilon_high -0.1: give more than 0"),
        ({"num_prompts": 0}, "--num_prompts 0: give more than 0"),
        ({"num_prompts": 1}, "--num_prompts 1: one completion cannot be compared"),
        (
            {"num_generations": 4},
            "this stage takes one completion of each prompt; leave it out, or take train_grpo.py",
        ),
    ],
)
def test_flags_out_of_range_are_refused(wrong, message, flags, capsys):
    with pytest.raises(SystemExit):
        train_spo.main(flags(**wrong))
    assert message in capsys.readouterr().err


def test_older_names_of_the_flags_are_known(flags):
    old = flags(initial_completions=None, initial_answers=3, clip_low=0.1, clip_high=0.4)
    args = parse_args(train_spo.SPOArgs, old)
    assert (args.initial_completions, args.epsilon, args.epsilon_high) == (3, 0.1, 0.4)

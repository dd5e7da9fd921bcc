"""PPO from end to end: two steps by hand, every way to cut one, resumption of both networks, what
is learned, mistakes.
"""

import copy
import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from model.model_minimind import MiniMindForCausalLM
from tests.helpers.prompt_rows import (
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
from trainer import train_ppo
from trainer.rl.rollout import Sample


@pytest.fixture(autouse=True)
def no_curve(monkeypatch):
    monkeypatch.setattr("trainer.runtime.loop.plot_curve", lambda folder: None)


@pytest.fixture
def flags(tmp_path):
    """flags(**changes) of a short run of 12 completions a step; moe=True starts from a mixture of
    experts.
    """

    def make(*switches, moe=False, flat=0, **changes):
        start = tmp_path / f"start{moe}"
        write_prompts(tmp_path / "prompts.jsonl", flat=flat)
        if not start.exists():
            write_policy(start, **(MOE if moe else {}))
        options = {"num_prompts": 12, "num_generations": 1, "num_minibatches": 2, **changes}
        return [*policy_flags(tmp_path, start, **options), *switches]

    return make


def extra_state(folder, step):
    """The critic's weights in a checkpoint."""
    return training_state(folder, step)["extra"]


def advantages_by_hand(rewards, values, gamma, gae_lambda):
    """Each token's sum over all that come after it, of one completion."""
    n = len(rewards)
    deltas = [
        rewards[t] + gamma * (values[t + 1] if t + 1 < n else 0) - values[t] for t in range(n)
    ]
    return torch.stack(
        [sum((gamma * gae_lambda) ** (k - t) * deltas[k] for k in range(t, n)) for t in range(n)]
    )


class ByHand:
    """Policy and critic of transformers' layers in float64, completion by completion, with one
    optimizer.
    """

    def __init__(self, start, temperature):
        self.policy, self.reference = (
            AutoModelForCausalLM.from_pretrained(start).double() for _ in range(2)
        )
        self.critic, self.value = copy.deepcopy(self.policy.model), torch.nn.Linear(32, 1).double()
        for x in self.value.parameters():
            torch.nn.init.zeros_(x)
        self.parts = torch.nn.ModuleList([self.policy, self.critic, self.value])
        self.optimizer = torch.optim.AdamW(
            self.parts.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0
        )
        self.temperature = temperature

    def log_probs(self, network, sample):
        return log_probs_of(logits_of(network, sample, self.temperature), sample)

    def values(self, sample):
        hidden = self.critic(torch.tensor([sample.prompt + sample.tokens])).last_hidden_state[0]
        return self.value(hidden)[len(sample.prompt) - 1 : -1, 0]

    @torch.no_grad()
    def judged(self, samples, beta, gamma, gae_lambda):
        """(log p, values, advantages, returns of each completion, metrics), as the step begins."""
        old = [self.log_probs(self.policy, one) for one in samples]
        divergence = [x - self.log_probs(self.reference, one) for x, one in zip(old, samples)]
        rewards = [-beta * x for x in divergence]
        for x, one in zip(rewards, samples):
            x[-1] += worth(one.row, one.text)
        values = [self.values(one) for one in samples]
        raw = [advantages_by_hand(x, v, gamma, gae_lambda) for x, v in zip(rewards, values)]
        every, flat = torch.cat(raw), torch.cat(values)
        returns = [a + v for a, v in zip(raw, values)]
        explained = 1 - (torch.cat(returns) - flat).var() / torch.cat(returns).var()
        return (
            old,
            values,
            [(a - every.mean()) / (every.var() + 1e-8).sqrt() for a in raw],
            returns,
            {
                "explained_variance": explained.item(),
                "value/mean": flat.mean().item(),
                "kl": torch.cat(divergence).mean().item(),
            },
        )

    def update(self, samples, judged, epsilon, cliprange_value, vf_coef):
        """One update on all completions: (the metrics of its beginning, the gradient's norm)."""
        sums = dict.fromkeys(("loss", "approx_kl", "entropy", "clip_fraction", "value_loss"), 0)
        num_tokens = sum(len(one.tokens) for one in samples)
        for one, before, v_old, A, R in zip(samples, *judged):
            now, v = self.log_probs(self.policy, one), self.values(one)
            ratio = (now - before).exp()
            policy_loss = torch.max(-ratio * A, -ratio.clamp(1 - epsilon, 1 + epsilon) * A).sum()
            near = torch.maximum(torch.minimum(v, v_old + cliprange_value), v_old - cliprange_value)
            value_loss = 0.5 * torch.max((v - R) ** 2, (near - R) ** 2).sum()
            is_cut = torch.where(A > 0, ratio > 1 + epsilon, (ratio < 1 - epsilon) & (A < 0))
            entropy = (
                torch.distributions.Categorical(
                    logits=logits_of(self.policy, one, self.temperature)
                )
                .entropy()
                .sum()
            )
            parts = {
                "loss": policy_loss + vf_coef * value_loss,
                "approx_kl": (ratio - 1 - ratio.log()).sum(),
                "entropy": entropy,
                "clip_fraction": is_cut.sum(),
                "value_loss": value_loss,
            }
            sums = {name: sums[name] + x / num_tokens for name, x in parts.items()}
        self.optimizer.zero_grad()
        sums["loss"].backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parts.parameters(), 1.0).item()
        self.optimizer.step()
        return {name: x.item() for name, x in sums.items()}, norm


@pytest.mark.parametrize(
    "temperature, judging",
    [
        (1.0, dict(gamma=1.0, gae_lambda=0.95, beta=0.05)),
        (0.7, dict(gamma=0.9, gae_lambda=0.5, beta=0.2)),
    ],
)
def test_two_steps_are_those_of_transformers_networks(
    temperature, judging, flags, tmp_path, monkeypatch
):
    """Two updates each. The critic's values begin at 0; both clips cut something; the divergence is
    there in step two.
    """
    rollouts = record_samples(monkeypatch, train_ppo)
    clips = dict(epsilon=0.1, cliprange_value=0.02, vf_coef=0.7)
    train_ppo.main(
        flags(
            max_steps=2,
            num_prompts=20,
            num_minibatches=1,
            update_epochs=2,
            val_ratio=0,
            temperature=temperature,
            **judging,
            **clips,
        )
    )
    folder = folder_of(tmp_path / "out")
    assert temperature < 1 or len({len(one.tokens) for one in rollouts[0] + rollouts[1]}) > 1
    hand = ByHand(tmp_path / "startFalse", temperature)
    for row, samples in zip(steps(folder), rollouts, strict=True):
        *judged, expected = hand.judged(samples, **judging)
        first, _ = hand.update(samples, judged, **clips)
        second, norm = hand.update(samples, judged, **clips)
        expected |= {name: (first[name] + second[name]) / 2 for name in first}
        assert {name: row[name] for name in expected} == pytest.approx(expected, rel=2e-3, abs=2e-5)
        assert row["grad_norm"] == pytest.approx(norm, rel=5e-3) and row["clip_fraction"] > 0.01
        assert row["targets"] == 2 * sum(
            len(one.tokens) for rollout in rollouts[: row["step"]] for one in rollout
        )
    first, second = steps(folder)
    assert first["explained_variance"] == first["value/mean"] == 0 and second["value/mean"] != 0
    assert abs(first["kl"]) < 1e-5 < 0.01 < abs(second["kl"])
    assert_close(weights(folder), hand.policy.float().state_dict(), 5e-3, 2e-5)
    critic = extra_state(folder, 2)
    assert_close(
        {name: critic[f"model.{name}"] for name in hand.critic.state_dict()},
        hand.critic.float().state_dict(),
        5e-3,
        2e-5,
    )
    torch.testing.assert_close(
        critic["value.weight"], hand.value.weight.detach().float(), rtol=0.02, atol=5e-5
    )


def test_a_token_pays_for_its_divergence_and_the_last_one_earns():
    """Padded to the longest; a sample without tokens earns nothing."""
    samples = [
        Sample({}, [1], [5] * n, [True] * n, [0.0] * n, rewards={"total": reward})
        for n, reward in ((3, 2.0), (0, 4.0), (1, -1.0))
    ]
    kl = torch.tensor([[0.5, -1.0, 0.25], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    assert train_ppo.token_rewards(samples, kl, 0.5).tolist() == [
        [-0.25, 0.5, 1.875],
        [0, 0, 0],
        [-1.5, 0, 0],
    ]


@pytest.mark.parametrize(
    "options", [{"moe": True, "beta": 0.1}, {"gradient_checkpointing": 1, "update_epochs": 1}]
)
def test_the_update_does_not_depend_on_how_a_step_is_cut(options, flags, tmp_path):
    """The last run computes activations again in backward, too."""
    results = []
    for batch_size in (99, 1):
        cut = {
            **options,
            "gradient_checkpointing": options.get("gradient_checkpointing", 0)
            if batch_size == 1
            else 0,
        }
        train_ppo.main(
            flags(
                **cut,
                save_dir=tmp_path / f"{batch_size}",
                batch_size=batch_size,
                max_steps=2,
                val_ratio=0,
            )
        )
        results.append(folder_of(tmp_path / f"{batch_size}"))
    assert_close(weights(results[1]), weights(results[0]), 2e-4)
    assert_close(extra_state(results[1], 2), extra_state(results[0], 2), 2e-4)
    names = (
        "loss",
        "grad_norm",
        "approx_kl",
        "entropy",
        "reward/total",
        "targets",
        "value_loss",
        "value/mean",
    )
    for ours, theirs in zip(steps(results[1]), steps(results[0]), strict=True):
        assert {name: ours[name] for name in names} == pytest.approx(
            {name: theirs[name] for name in names}, rel=1e-3, abs=1e-5
        )


@pytest.mark.parametrize(
    "options",
    [
        {"moe": True, "num_prompts": 5, "beta": 0.1, "target_kl": 0.01, "update_epochs": 3},
        {"num_prompts": 2, "num_minibatches": 4, "lora_rank": 4},
    ],
)
def test_two_ranks_learn_what_one_learns(options, flags, tmp_path):
    """Updates that end early end on both; and updates of one completion each, which leave the
    second rank nothing.
    """
    options = {**options, "max_steps": 2}
    train_ppo.main(flags(**options, save_dir=tmp_path / "one"))
    run_ranks(2, "ppo", flags(**options, save_dir=tmp_path / "two"))
    one, two = (folder_of(tmp_path / name) for name in ("one", "two"))
    for ours, theirs in zip(metrics(two), metrics(one), strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            if not name.startswith("expert_load"):  # counts the padding too
                assert ours[name] == pytest.approx(theirs[name], rel=2e-3, abs=2e-5), name
    assert any(row["stopped_early"] for row in steps(one)) == ("target_kl" in options)
    assert_close(extra_state(two, 2), extra_state(one, 2), 5e-4, 2e-6)


@pytest.mark.parametrize(
    "options",
    [{"beta": 0.1, "dtype": "bfloat16"}, {"lora_rank": 4, "target_kl": 0.003, "optimizer": "muon"}],
)
def test_an_interrupted_run_resumes_bit_for_bit(options, flags, tmp_path, monkeypatch):
    """The critic and the optimizer of both networks too."""
    train_ppo.main(flags(**options, save_dir=tmp_path / "whole"))
    interrupt(train_ppo, flags(**options))
    again = record_steps(monkeypatch, train_ppo)
    train_ppo.main(flags("--from_resume", **options))
    whole, resumed = folder_of(tmp_path / "whole"), folder_of(tmp_path / "out")
    assert again == [4, 5, 6, 7]
    assert_same_end(resumed, whole)
    assert_same(extra_state(resumed, 8), extra_state(whole, 8))
    assert (extra_state(whole, 8)["value.weight"] != extra_state(whole, 4)["value.weight"]).all()
    assert {row["step"] for row in transcripts(whole)} == set(range(1, 9))


def test_a_policy_that_has_moved_too_far_ends_the_step(flags, tmp_path):
    """One update of three, and the weights of a run that makes only one."""
    common = dict(num_minibatches=1, max_steps=3, val_ratio=0)
    train_ppo.main(flags(**common, update_epochs=3, target_kl=1e-9, save_weight="stopped"))
    train_ppo.main(flags(**common, update_epochs=1, save_weight="once"))
    train_ppo.main(flags(**common, update_epochs=3, target_kl=1e9, save_weight="never"))
    stopped, once, never = (
        tmp_path / "out" / f"{name}_32x2" for name in ("stopped", "once", "never")
    )
    assert_same(weights(stopped), weights(once))
    assert_same(extra_state(stopped, 3), extra_state(once, 3))
    assert [row["stopped_early"] for row in steps(stopped)] == [1, 1, 1]
    assert all(row["approx_kl/last_update"] > 1e-9 for row in steps(stopped))
    assert all(row["approx_kl/last_update"] < 1e-9 for row in steps(once))
    assert [row["stopped_early"] for row in steps(once) + steps(never)] == [0] * 6
    assert [row["targets"] for row in steps(stopped)] == [row["targets"] for row in steps(once)]
    assert steps(never)[0]["targets"] == 3 * steps(once)[0]["targets"]
    assert any((weights(never)[name] != x).any() for name, x in weights(once).items())


def test_what_is_rewarded_is_learned_and_the_critic_learns_what_to_expect(flags, tmp_path):
    """A bandit with a known optimum: eight letters up to m earn 1, any letters about a half."""
    train_ppo.main(
        flags(
            dtype="bfloat16",
            max_steps=15,
            val_interval=15,
            num_prompts=16,
            json=tmp_path / "metrics.json",
        )
    )
    folder = folder_of(tmp_path / "out")
    rows = steps(folder)
    rewards = [row["reward/total"] for row in rows]
    assert sum(rewards[:2]) / 2 < 0.65 and sum(rewards[-3:]) / 3 > 0.9
    assert rows[0]["value/mean"] == 0 and rows[-1]["value/mean"] == pytest.approx(
        rewards[-1], abs=0.15
    )
    assert rows[-1]["value_loss"] < 0.2 * rows[0]["value_loss"]
    first, last = held_out_rewards(folder)
    assert first < 0.8 and last > 0.95
    assert json.loads((tmp_path / "metrics.json").read_text())["val_reward/total/held_out"] == last
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model).__name__ == "Qwen3ForCausalLM" and model.dtype == torch.float32
    assert not any("critic" in name or "value" in name for name in weights(folder))


def test_low_rank_adapters_are_all_of_the_policy_that_moves(flags, tmp_path, monkeypatch):
    rollouts = record_samples(monkeypatch, train_ppo)
    command = flags(lora_rank=4, learning_rate=1e-2, val_ratio=0, max_steps=5, save_interval=4)
    before = {path.name: path.read_bytes() for path in (tmp_path / "startFalse").iterdir()}
    train_ppo.main(command)
    folder = folder_of(tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "startFalse").iterdir()} == before
    assert (folder / "adapter_model.safetensors").is_file() and not list(
        folder.rglob("model.safetensors")
    )
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "startFalse")
    plain = [log_probs_of(logits_of(base, one), one).detach() for one in rollouts[4]]
    peft = PeftModel.from_pretrained(base, folder / "checkpoints" / "step-4").eval()
    for sample, theirs in zip(rollouts[4], plain):
        torch.testing.assert_close(
            sample.old_log_probs,
            log_probs_of(logits_of(peft, sample), sample).detach(),
            atol=1e-3,
            rtol=1e-3,
        )
        assert (sample.old_log_probs - theirs).abs().max() > 0.1
    critic = MiniMindForCausalLM.from_pretrained(tmp_path / "startFalse").model.state_dict()
    moved = [
        name
        for name, x in critic.items()
        if (extra_state(folder, 4).get(f"model.{name}") != x).any()
    ]
    assert len(moved) == len(critic)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(epsilon=0), "--epsilon 0.0: give more than 0"),
        (dict(cliprange_value=-1), "--cliprange_value -1.0: give more than 0"),
        (dict(vf_coef=-1), "--vf_coef -1.0: give 0 or more"),
        (dict(target_kl=-1), "--target_kl -1.0: give 0 or more"),
        (dict(gamma=1.1), "--gamma 1.1: give a ratio from 0 to 1"),
        (dict(gae_lambda=-0.1), "--gae_lambda -0.1: give a ratio from 0 to 1"),
    ],
)
def test_flags_that_make_no_sense_are_refused(wrong, message, flags, capsys):
    with pytest.raises(SystemExit):
        train_ppo.main(flags(**wrong))
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "old",
    [
        dict(clip=0.3, value_clip=0.4, value_weight=0.6, discount=0.9, kl_weight=0.1, kl_kind="k2"),
        dict(cliprange=0.3, cliprange_value=0.4, gamma=0.9, kl_coef=0.1, kl_estimator="k2"),
    ],
)
def test_other_names_of_the_flags_are_known(old, flags):
    """Our older ones, and TRL's."""
    args = train_ppo.parse_args(train_ppo.PPOArgs, flags(**old))
    assert (args.epsilon, args.cliprange_value, args.gamma) == (0.3, 0.4, 0.9)
    assert (args.vf_coef, args.beta) == (old.get("value_weight", 0.5), 0.1)
    assert args.kl_estimator == "k2"

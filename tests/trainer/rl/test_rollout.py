"""Rollouts: log-probabilities of the very distribution sampled from, a seed for each completion."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dataset.prompt_dataset import PromptDataset
from model.model_minimind import MiniMindForCausalLM
from tests.helpers.networks import write_network
from trainer.losses.policy import token_log_probs
from trainer.rl.rollout import (
    Rollout,
    Sample,
    SingleTurn,
    Stopwatch,
    draw_seed,
    part_of_rank,
    rollout_metrics,
    sample_groups,
    total_rewards,
)
from trainer.runtime.ranks import Ranks

ROWS = "".join(
    json.dumps({"conversations": [{"role": "user", "content": text}], "answer": "1"}) + "\n"
    for text in ("one", "a longer question than that", "what", "and this?")
)


@pytest.fixture
def world(tmp_path):
    """(run, model, tokenizer, dataset) of a random network that rarely ends its completions."""
    folder = write_network(tmp_path / "net", 0, hidden_size=32, num_hidden_layers=2)
    (tmp_path / "rows.jsonl").write_text(ROWS)
    model, tokenizer = (
        MiniMindForCausalLM.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    args = SimpleNamespace(
        temperature=0.7,
        rollout_batch_size=3,
        max_seq_len=64,
        max_completion_length=12,
        num_generations=2,
        thinking=None,
        seed=42,
    )
    run = SimpleNamespace(args=args, device=torch.device("cpu"), dtype=torch.float32, ranks=Ranks())
    return run, model, tokenizer, PromptDataset(tmp_path / "rows.jsonl", tokenizer, 40)


def sampled(world, items=(0, 1, 1, 2, 3)):
    run, model, tokenizer, dataset = world
    sampler = SingleTurn(run, Rollout(run, model, tokenizer))
    return sampler(dataset, list(items), [draw_seed(1, n) for n in range(len(items))])


def test_log_probs_are_those_of_the_sampled_distribution(world, tmp_path):
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "net")
    for sample in sampled(world):
        ids = torch.tensor([sample.prompt + sample.tokens])
        expected = (reference(ids).logits[0] / 0.7).log_softmax(-1)[len(sample.prompt) - 1 : -1]
        expected = expected.gather(1, torch.tensor(sample.tokens)[:, None])[:, 0]
        torch.testing.assert_close(sample.old_log_probs, expected, atol=2e-4, rtol=1e-4)


def test_a_seed_decides_a_completion_whatever_is_batched_with_it(world):
    together = sampled(world)
    assert together[1].tokens != together[2].tokens  # one prompt, two seeds
    run, model, tokenizer, dataset = world
    sampler = SingleTurn(run, Rollout(run, model, tokenizer))
    (alone,) = sampler(dataset, [1], [draw_seed(1, 2)])
    assert alone.tokens == together[2].tokens and alone.text == together[2].text
    question = dataset.rows[1]["conversations"]
    assert alone.messages == [*question, {"role": "assistant", "content": alone.text}]
    assert (alone.item, alone.row, alone.prompt) == (1, dataset.rows[1], dataset.prompts[1])


def test_reasoning_that_the_prompt_opens_is_part_of_the_text(world):
    plain = sampled(world, [0])[0]
    world[0].args.thinking = True
    (opened,) = sampled(world, [0])
    assert opened.text == "<think>\n" + plain.text and opened.tokens == plain.tokens


def test_a_completion_ends_by_itself_or_is_cut(world):
    run, model, tokenizer, _ = world
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] *= 0
    cut = sampled(world, [0])[0]
    assert len(cut.tokens) == cut.num_sampled == 12 and not cut.is_complete
    with torch.no_grad():  # the end is all that is ever likely
        model.lm_head.weight.zero_()
        model.model.norm.weight.fill_(1)
        model.lm_head.weight[tokenizer.pad_token_id] = 0.0
    run.args.temperature = 1e-3
    model.generation_config.eos_token_id = list(range(6400))
    done = sampled(world, [0])[0]
    assert len(done.tokens) == 1 and done.is_complete and done.text == ""


def test_refresh_takes_the_new_weights(world):
    run, model, tokenizer, dataset = world
    rollout = Rollout(run, model, tokenizer)
    before = rollout([dataset.prompts[0]], [5], 8)[0]
    with torch.no_grad():
        model.lm_head.weight.mul_(-1)
    assert rollout([dataset.prompts[0]], [5], 8)[0].tokens == before.tokens
    rollout.refresh()
    assert rollout([dataset.prompts[0]], [5], 8)[0].tokens != before.tokens


def test_groups_have_a_seed_for_each_sample(world):
    """It depends on the run's seed, the key, the prompt's place and the number in the group; the
    ranks take one part each.
    """
    run, _, _, dataset = world
    asked = []

    def sampler(dataset, items, seeds, temperature=None):
        asked.append(list(zip(items, seeds)))
        return []

    sample_groups(run, sampler, dataset, [3, 1, 3], 7, 0)
    expected = [
        (item, draw_seed(42, 7, 0, place, number))
        for place, item in enumerate([3, 1, 3])
        for number in range(2)
    ]
    assert asked.pop() == expected and len({seed for _, seed in expected}) == 6
    for rank in range(2):
        run.ranks = SimpleNamespace(rank=rank, world_size=2)
        sample_groups(run, sampler, dataset, [3, 1, 3], 7, 0)
    assert asked[0] + asked[1] == expected and len(asked[0]) == 4


def test_the_parts_of_the_ranks_add_up():
    ranks = [SimpleNamespace(rank=rank, world_size=3) for rank in range(3)]
    parts = [part_of_rank(list("abcdefg"), one) for one in ranks]
    assert [item for part in parts for item in part] == list("abcdefg")


def test_seeds_depend_on_their_key_alone():
    assert draw_seed(1, 2) == draw_seed(1, 2) != draw_seed(2, 1) and 0 <= draw_seed("x") < 2**63


def test_the_fraction_of_the_time_spent_sampling(monkeypatch):
    now = iter([10.0, 12, 15, 20, 21, 25, 30])
    monkeypatch.setattr("trainer.rl.rollout.time.perf_counter", lambda: next(now))
    watch = Stopwatch()
    with watch:
        pass  # from 12 to 15
    assert watch.lap() == 0.3
    with watch:
        pass  # from 21 to 25, of the 10 since then
    assert watch.lap() == 0.4


def test_metrics_of_a_rollout_by_hand():
    """Lengths are of the sampled tokens alone."""
    samples = [
        Sample({}, [1], [5] * n, [i != 1 for i in range(n)], [0.0] * n, is_complete=done, rewards=x)
        for n, done, x in (
            (3, True, {"answer": 1.0, "total": 0.5}),
            (1, False, {"answer": 0.0, "total": 0.25}),
        )
    ]
    watch = SimpleNamespace(lap=lambda: 0.7)
    assert rollout_metrics(samples, SimpleNamespace(watch=watch)) == {
        "reward/answer": 0.5,
        "reward/total": 0.375,
        "reward/std": np.std([0.5, 0.25]),
        "completions/mean_length": 1.5,
        "completions/max_length": 2,
        "completions/finished_ratio": 0.5,
        "rollout_ratio": 0.7,
    }
    assert total_rewards(samples).tolist() == [0.5, 0.25]
    assert total_rewards([]).dtype == torch.float64


def test_token_log_probs_of_a_temperature():
    logits, targets = torch.randn(4, 10), torch.tensor([1, 2, 3, 0])
    log_probs, _ = token_log_probs(logits, targets, 0.5)
    torch.testing.assert_close(log_probs, (logits * 2).log_softmax(-1)[torch.arange(4), targets])

"""Rollouts: log-probabilities of the very distribution sampled from, seeds per answer; samples as packed micro-batches."""

import json
from types import SimpleNamespace

import pytest
import torch
from test_train_distillation import write_network
from transformers import AutoModelForCausalLM, AutoTokenizer

from dataset.prompt_dataset import PromptDataset
from model.model_minimind import MiniMindForCausalLM
from trainer.distributed import Ranks
from trainer.experience import collate_samples, for_each_token, micro_batches_of, minibatches
from trainer.policy import policy_outputs
from trainer.policy_losses import token_log_probs
from trainer.rollout import Rollout, Sample, Stopwatch, answer_samples, draw_seed, share_of

ROWS = "".join(json.dumps({"conversations": [{"role": "user", "content": text}], "answer": "1"}) + "\n"
               for text in ("one", "a longer question than that", "what", "and this?"))


@pytest.fixture
def world(tmp_path):
    """(model, tokenizer, args, run, dataset) of a random network that rarely ends its answers."""
    folder = write_network(tmp_path / "net", 0, hidden_size=32, num_hidden_layers=2)
    (tmp_path / "rows.jsonl").write_text(ROWS)
    model, tokenizer = MiniMindForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    args = SimpleNamespace(temperature=0.7, rollout_batch_size=3, max_seq_len=64, batch_size=2)
    run = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32, ranks=Ranks(), autocast=torch.no_grad,
                          to_device=lambda batch: batch)
    return model, tokenizer, args, run, PromptDataset(tmp_path / "rows.jsonl", tokenizer, 40)


def sampled(world, items=(0, 1, 1, 2, 3), max_new_tokens=12):
    model, tokenizer, args, run, dataset = world
    return answer_samples(Rollout(model, tokenizer, run, args), dataset, list(items),
                          [draw_seed(1, n) for n in range(len(items))], max_new_tokens)


def test_log_probs_are_those_of_the_sampled_distribution(world, tmp_path):
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "net")
    for sample in sampled(world):
        ids = torch.tensor([sample.prompt + sample.tokens])
        expected = (reference(ids).logits[0] / 0.7).log_softmax(-1)[len(sample.prompt) - 1 : -1]
        expected = expected.gather(1, torch.tensor(sample.tokens)[:, None])[:, 0]
        torch.testing.assert_close(sample.old_log_probs, expected, atol=2e-4, rtol=1e-4)


def test_a_seed_decides_an_answer_whatever_stands_beside_it(world):
    together = sampled(world)
    assert together[1].tokens != together[2].tokens  # one prompt, two seeds
    alone = answer_samples(Rollout(*world[:2], world[3], world[2]), world[4], [1], [draw_seed(1, 2)], 12)[0]
    assert alone.tokens == together[2].tokens and alone.text == together[2].text
    assert alone.messages == [*world[4].rows[1]["conversations"], {"role": "assistant", "content": alone.text}]


def test_an_answer_ends_by_itself_or_is_cut(world):
    model, tokenizer, args, _, _ = world
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] *= 0
    cut = sampled(world, [0])[0]
    assert len(cut.tokens) == cut.num_sampled == 12 and not cut.is_complete
    with torch.no_grad():  # the end is all that is ever likely
        model.lm_head.weight.zero_()
        model.model.norm.weight.fill_(1)
        model.lm_head.weight[tokenizer.pad_token_id] = 0.0
    args.temperature = 1e-3
    model.generation_config.eos_token_id = list(range(6400))
    done = sampled(world, [0])[0]
    assert len(done.tokens) == 1 and done.is_complete and done.text == ""


def test_the_share_of_the_time_in_which_answers_are_written(monkeypatch):
    now = iter([10.0, 12, 15, 20, 21, 25, 30])
    monkeypatch.setattr("trainer.rollout.time.perf_counter", lambda: next(now))
    watch = Stopwatch()
    with watch:
        pass  # from 12 to 15
    assert watch.share() == 0.3
    with watch:
        pass  # from 21 to 25, of the 10 since then
    assert watch.share() == 0.4


def test_refresh_takes_the_new_weights(world):
    model, tokenizer, args, run, dataset = world
    rollout = Rollout(model, tokenizer, run, args)
    before = rollout([dataset.prompts[0]], [5], 8)[0]
    with torch.no_grad():
        model.lm_head.weight.mul_(-1)
    assert rollout([dataset.prompts[0]], [5], 8)[0].tokens == before.tokens
    rollout.refresh()
    assert rollout([dataset.prompts[0]], [5], 8)[0].tokens != before.tokens


def tool_sample(tokenizer):
    """A conversation whose middle the environment wrote, with the padding id among what was sampled."""
    pad = tokenizer.pad_token_id
    return Sample({}, [5, 6, 7], [pad, 9, 10, 11, pad, 12], [True, True, False, False, True, True],
                  [-1.0, -2.0, 0.0, 0.0, -3.0, -4.0], "", [], True)


def test_a_micro_batch_has_what_was_sampled_and_nothing_else(world):
    _, tokenizer, _, _, _ = world
    samples = [*sampled(world), tool_sample(tokenizer)]
    columns = {"old_log_probs": [one.old_log_probs for one in samples]}
    batch = collate_samples([[5, 0], [2, 1]], samples, columns, 64, tokenizer.pad_token_id)
    order = [5, 0, 2, 1]
    expected = [token for i in order for token, is_sampled in zip(samples[i].tokens, samples[i].is_sampled) if is_sampled]
    assert batch["targets"].tolist() == expected and int(batch["is_source"].sum()) == len(expected)
    assert batch["sequence"].tolist() == [i for i in order for _ in range(samples[i].num_sampled)]
    assert batch["old_log_probs"].tolist() == pytest.approx([x for i in order for x in samples[i].old_log_probs.tolist()])
    ids = batch["input_ids"]
    after = ids.roll(-1, 1)[batch["is_source"]]  # each source is followed by its target
    assert after.tolist() == expected


def test_a_micro_batch_of_nothing_has_no_targets(world):
    batch = collate_samples([], [], {"advantages": []}, 64, 0)
    assert len(batch["targets"]) == len(batch["advantages"]) == 0 and batch["input_ids"].shape == (1, 64)


def test_packed_log_probs_are_those_of_the_rollout(world):
    model, tokenizer, args, run, _ = world
    samples = sampled(world)
    found = for_each_token(lambda batch: policy_outputs(model, batch, 1, args.temperature)[0], model, samples, run, args,
                           tokenizer.pad_token_id)
    assert [len(x) for x in found] == [one.num_sampled for one in samples]
    for sample, log_probs in zip(samples, found):
        torch.testing.assert_close(log_probs, sample.old_log_probs, atol=2e-4, rtol=1e-4)


def test_every_sample_is_in_one_micro_batch_of_one_rank(world):
    _, tokenizer, args, run, _ = world
    samples, seen = sampled(world, [0, 1, 2, 3] * 5), []
    for rank in range(2):
        run.ranks.rank, run.ranks.world_size = rank, 2
        parts = micro_batches_of(samples, list(range(20)), {}, run, args, tokenizer.pad_token_id, 7)
        assert all(len(part["input_ids"]) <= args.batch_size for part in parts)
        seen += [number for part in parts for number in part["sequence"].unique().tolist()]
    assert sorted(seen) == list(range(20))
    parts = minibatches(20, 3, 1, 0)
    assert sorted(i for part in parts for i in part) == list(range(20)) and [len(part) for part in parts] == [7, 7, 6]
    assert parts != minibatches(20, 3, 1, 1) and len(minibatches(2, 5, 1, 0)) == 2


def test_shares_add_up():
    ranks = [SimpleNamespace(rank=rank, world_size=3) for rank in range(3)]
    assert [item for one in ranks for item in share_of(list("abcdefg"), one)] == list("abcdefg")
    assert draw_seed(1, 2) != draw_seed(2, 1) and 0 <= draw_seed("x") < 2**63


def test_token_log_probs_of_a_temperature():
    logits, targets = torch.randn(4, 10), torch.tensor([1, 2, 3, 0])
    log_probs, _ = token_log_probs(logits, targets, 0.5)
    torch.testing.assert_close(log_probs, (logits * 2).log_softmax(-1)[torch.arange(4), targets])

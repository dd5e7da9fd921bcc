"""Samples as packed micro-batches: every sampled token is there once, with its numbers, whatever
the cut.
"""

from types import SimpleNamespace

import pytest
import torch

from model.model_minimind import MiniMindForCausalLM
from tests.helpers.networks import write_network
from trainer.rl.experience import (
    collate_samples,
    for_each_token,
    micro_batches_of,
    minibatches,
    policy_outputs,
    reference_log_probs,
    sample_log_probs,
    shuffled_parts,
    token_experience,
)
from trainer.rl.rollout import Sample

PAD = 0


@pytest.fixture
def samples():
    """Samples of several lengths; the environment wrote the middle of the last one, and the padding
    id is among its sampled tokens.
    """
    random = torch.Generator().manual_seed(1)

    def draw(n):
        return torch.randint(1, 6400, (n,), generator=random).tolist()

    made = [
        Sample({}, draw(m), draw(n), [True] * n, [-0.5 - i for i in range(n)])
        for m, n in ((3, 5), (20, 12), (7, 1), (9, 9), (4, 0))
    ]
    is_sampled = [True, True, False, False, True, True]
    log_probs = [-1.0, -2.0, 0.0, 0.0, -3.0, -4.0]
    made.append(Sample({}, [5, 6, 7], [PAD, 9, 10, 11, PAD, 12], is_sampled, log_probs))
    return made


def a_run(rank=0, world_size=1, **options):
    defaults = {"max_seq_len": 64, "batch_size": 2, "temperature": 0.7, "seed": 42}
    return SimpleNamespace(
        args=SimpleNamespace(**{**defaults, **options}),
        device=torch.device("cpu"),
        ranks=SimpleNamespace(rank=rank, world_size=world_size, gather=lambda items: items),
        autocast=torch.no_grad,
        to_device=lambda batch: batch,
    )


def test_a_micro_batch_has_the_sampled_tokens_and_no_others(samples):
    experience = token_experience(samples, torch.arange(6.0))
    order = [5, 0, 2, 1]
    batch = collate_samples([[5, 0], [2, 1]], samples, experience, 64, PAD)
    pairs = [(i, x) for i in order for x in zip(samples[i].tokens, samples[i].is_sampled)]
    expected = [token for _, (token, is_sampled) in pairs if is_sampled]
    assert batch["targets"].tolist() == expected and int(batch["is_source"].sum()) == len(expected)
    assert batch["sequence"].tolist() == [i for i in order for _ in range(samples[i].num_sampled)]
    assert batch["advantages"].tolist() == batch["sequence"].tolist()
    assert batch["old_log_probs"].tolist() == [
        x for i in order for x in samples[i].old_log_probs.tolist()
    ]
    after = batch["input_ids"].roll(-1, 1)[batch["is_source"]]  # each source precedes its target
    assert after.tolist() == expected


def test_a_micro_batch_of_nothing_has_no_targets():
    batch = collate_samples([], [], {"advantages": []}, 64, PAD)
    assert len(batch["targets"]) == len(batch["advantages"]) == 0
    assert batch["input_ids"].shape == (1, 64)


def test_every_sample_is_in_one_micro_batch_of_one_rank(samples):
    many, seen = samples * 4, []
    for rank in range(2):
        numbers = list(range(len(many)))
        parts = micro_batches_of(a_run(rank, 2), many, numbers, {}, PAD, 7)
        assert all(len(part["input_ids"]) <= 2 for part in parts)
        seen += [number for part in parts for number in part["sequence"].unique().tolist()]
    assert sorted(seen) == [i for i in range(len(many)) if many[i].num_sampled]


def test_parts_are_shuffled_anew_in_each_epoch():
    parts = shuffled_parts(20, 3, 1, 0)
    assert sorted(i for part in parts for i in part) == list(range(20))
    assert [len(part) for part in parts] == [7, 7, 6] and parts == shuffled_parts(20, 3, 1, 0)
    assert parts != shuffled_parts(20, 3, 1, 1) and len(shuffled_parts(2, 5, 1, 0)) == 2


def test_minibatches_count_over_all_ranks(samples):
    experience = token_experience(samples, torch.zeros(6))
    updates = [
        list(
            minibatches(
                a_run(rank, 2, update_epochs=2, num_minibatches=3), samples, experience, PAD, 4
            )
        )
        for rank in range(2)
    ]
    assert len(updates[0]) == len(updates[1]) == 2 * 3
    total = sum(sample.num_sampled for sample in samples)
    for (ours, num_tokens, num_samples), (theirs, *counts) in zip(*updates):
        assert [num_tokens, num_samples] == counts and num_samples == 2
        assert len(ours) == len(theirs)  # all ranks call backward equally often
        assert num_tokens == sum(len(micro["targets"]) for micro in ours + theirs)
    assert sum(num_tokens for _, num_tokens, _ in updates[0]) == 2 * total
    nothing = minibatches(a_run(update_epochs=2, num_minibatches=3), [], {}, PAD, 4)
    assert list(nothing) == []


@pytest.fixture
def network(tmp_path):
    folder = write_network(tmp_path / "net", 0, hidden_size=32, num_hidden_layers=2)
    return MiniMindForCausalLM.from_pretrained(folder)


def test_packed_log_probs_are_those_of_plain_forwards(network, samples):
    run, rest = a_run(), [one for one in samples if one.num_sampled]
    found = sample_log_probs(run, network, PAD, rest)
    for sample, log_probs in zip(rest, found, strict=True):
        ids = torch.tensor([sample.prompt + sample.tokens])
        plain = (network(ids).logits[0] / 0.7).log_softmax(-1)[len(sample.prompt) - 1 : -1]
        plain = plain.gather(1, torch.tensor(sample.tokens)[:, None])[:, 0]
        plain = plain[torch.tensor(sample.is_sampled)]
        torch.testing.assert_close(log_probs, plain.detach(), atol=2e-4, rtol=1e-4)


def test_a_reference_has_no_gradient(network, samples):
    batch = collate_samples([[0, 1]], samples, {}, 64, PAD)
    log_probs, entropies, _ = policy_outputs(network, batch, 17, 0.7)
    reference = reference_log_probs(network, batch, 0.7)
    assert log_probs.requires_grad and not entropies.requires_grad and not reference.requires_grad
    assert torch.equal(log_probs.detach(), reference) and (entropies > 0).all()


def test_scores_come_back_in_the_samples_order(samples):
    """In evaluation mode; a sample without tokens has none."""
    net = torch.nn.Dropout()
    found = for_each_token(
        a_run(batch_size=1), net, lambda batch: batch["targets"] + 7000 * net.training, samples, PAD
    )
    expected = [
        [float(token) for token, is_sampled in zip(one.tokens, one.is_sampled) if is_sampled]
        for one in samples
    ]
    assert [x.tolist() for x in found] == expected and net.training

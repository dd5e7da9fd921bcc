"""Preference pairs in training: the frozen reference, KTO's KL, metrics, and the warning."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from dataset.chat.format import encode_conversation
from dataset.pair_dataset import PairDataset
from model.model_minimind import MiniMindForCausalLM
from model.native_format import network_sha256
from tests.helpers.pair_rows import talk, write_start
from tests.helpers.runs import assert_same
from trainer import train_dpo
from trainer.runtime.means import Means
from trainer.runtime.pairs import Reference, StuckWarning, note_pairs, with_margin
from trainer.runtime.run import Run

ALONE = SimpleNamespace(sum_tensor=lambda x: x)  # one rank


def log_ratio(networks, messages):
    """log p / p_ref of the assistant's message, each text alone through transformers' networks."""
    tokenizer, (now, then) = networks
    ids, is_target = (torch.tensor(x) for x in encode_conversation(tokenizer, messages))
    with torch.no_grad():
        sums = [
            net(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[is_target[1:]]
            for net in (now, then)
        ]
    return (sums[0].sum() - sums[1].sum()).item()


def test_the_kl_is_the_mean_log_ratio_of_completions_to_other_prompts(tmp_path):
    """The mean is over all completions, of pairs and single ones."""
    rows = [
        {
            "chosen": talk(f"What is {i}?", "Gladly! It is." * (1 + i % 2)),
            "rejected": talk(f"What is {i}?", f"No {i}"),
        }
        for i in range(5)
    ] + [{"conversations": talk("And 7?", "Who knows"), "label": False}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folders = [write_start(tmp_path / name, seed) for name, seed in (("now", 1), ("then", 2))]
    now, then = map(MiniMindForCausalLM.from_pretrained, folders)
    tokenizer = AutoTokenizer.from_pretrained(folders[0])
    options = dict(cache_dir=tmp_path / "cache", num_proc=1, unpaired=True)
    dataset = PairDataset(tmp_path / "rows.jsonl", tokenizer, 96, **options)
    run = Run(train_dpo.DPOArgs(device="cpu", reference="on_the_fly", loss_type="kto"))
    items = [{"items": torch.tensor(part)} for part in ([0, 1, 5], [2], [3, 4])]

    networks = tokenizer, [AutoModelForCausalLM.from_pretrained(x).double() for x in folders]
    ratios = []
    for i, row in enumerate(rows):
        prompt = row.get("chosen", row.get("conversations"))[:1]
        other = rows[(i + 1) % len(rows)]  # all prompts differ
        sides = [name for name in ("chosen", "rejected", "conversations") if name in other]
        ratios += [log_ratio(networks, [*prompt, other[name][-1]]) for name in sides]
    mean = sum(ratios) / len(ratios)
    assert len(ratios) == 11 and abs(mean) > 0.1
    for sign, model, frozen in ((1, now, then), (-1, then, now)):
        reference = Reference(run, frozen, [dataset], tokenizer.pad_token_id)
        kl = reference.estimate_kl(model, dataset, items)
        assert kl == pytest.approx(max(0.0, sign * mean), rel=1e-4)


def test_a_reference_has_a_name_of_its_own_for_each_network(tmp_path):
    """By its weights and by its configuration, which changes what they compute; not by where its
    folder lies.
    """
    rope = {"rope_theta": 1e4, "rope_type": "default"}
    folders = [
        write_start(tmp_path / "a"),
        write_start(tmp_path / "b", rope_parameters=rope),
        write_start(tmp_path / "c", seed=2),
        write_start(tmp_path / "d"),
    ]
    names = [network_sha256(MiniMindForCausalLM.from_pretrained(folder)) for folder in folders]
    assert names[3] == names[0] and len(set(names)) == 3
    assert_same(*(load_file(folder / "model.safetensors") for folder in folders[:2]))


def test_the_metrics_of_pairs():
    """Over two micro-batches; a tie of the rewards counts as half right."""
    means = Means()
    rewards = torch.tensor([[2.0, 1.0], [0.5, 0.5]])
    note_pairs(means, torch.tensor([1.0, 3.0]), rewards, -rewards)
    note_pairs(means, torch.tensor([5.0]), torch.tensor([[1.0, 3.0]]), torch.tensor([[4.0, 0.0]]))
    assert with_margin(means.reduce(ALONE)) == pytest.approx(
        {
            "loss": 3.0,
            "rewards/chosen": 3.5 / 3,
            "rewards/rejected": 1.5,
            "rewards/accuracies": 0.5,
            "rewards/margins": -1 / 3,
            "log_probs/chosen": 0.5,
            "log_probs/rejected": -0.5,
            "log_probs/accuracies": 0.5,
        }
    )


def test_a_missing_side_counts_nowhere():
    """KTO's loss is a mean over completions; without any pair there is no accuracy."""
    means = Means()
    rewards, lengths = torch.tensor([[2.0, 7.0], [7.0, 1.0]]), torch.tensor([[3, 0], [0, 2]])
    note_pairs(means, torch.tensor([1.0, 4.0]), rewards, None, lengths, per_completion=True)
    expected = {"loss": 2.5, "rewards/chosen": 2.0, "rewards/rejected": 1.0, "rewards/margins": 1.0}
    assert with_margin(means.reduce(ALONE)) == expected
    note_pairs(means, torch.tensor([1.0]), rewards[:1], None, lengths[:1], per_completion=True)
    assert with_margin(means.reduce(ALONE)) == {"loss": 1.0, "rewards/chosen": 2.0}


@pytest.mark.parametrize(
    "num_steps, margins, warned_at",
    [
        (12, [0.001] * 12, 10),
        (60, [0.001] * 60, 20),
        (3, [0.001] * 3, 3),
        (12, [0.5] * 12, None),
        (1, [0.0], None),  # of the network before its only update
        (3, [0.0, None, None], None),  # kto without pairs
        (12, [0.5] + [0.001] * 11, 10),
        (12, [0.03, -0.03] * 6, 10),  # it goes up and down
    ],
)
def test_a_margin_that_stays_about_0_is_warned_of_once(num_steps, margins, warned_at):
    stuck = StuckWarning(num_steps, 1e-8)
    warnings = {done: stuck.after(done, margin) for done, margin in enumerate(margins, 1)}
    assert [done for done, text in warnings.items() if text] == ([warned_at] if warned_at else [])
    if warned_at:
        assert f"after {warned_at} of {num_steps} steps" in warnings[warned_at]
        assert "--learning_rate 1e-08 is too low" in warnings[warned_at]

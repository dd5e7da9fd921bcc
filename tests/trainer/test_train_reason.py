"""The reasoning stage: its loss by hand and next to fine-tuning, accumulation, ranks, resumption,
and the format that it teaches.
"""

import importlib.util
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from dataset.chat.format import encode_prompt
from dataset.lm_dataset import ReasonDataset
from dataset.packing import PackedBatches
from tests.helpers.checkpoints import load_tokenizer, random_network
from tests.helpers.ranks import run_ranks
from tests.helpers.rows import chat, write
from tests.helpers.runs import assert_same, interrupt, losses, metrics, weights
from trainer import train_full_sft, train_reason
from trainer.runtime.arguments import parse_args
from trainer.runtime.metrics import read_metrics

NAME = "reason_32x2"
SHAPE = dict(num_hidden_layers=2, qk_norm=True, initializer_range=0.2)
network = partial(random_network, 0, **SHAPE)
needs_deepspeed = pytest.mark.skipif(
    not importlib.util.find_spec("deepspeed"), reason="DeepSpeed is not installed"
)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture
def thoughts(tmp_path):
    """A file of 60 rows with reasoning of several lengths."""
    return write(
        tmp_path / "thoughts.jsonl",
        [
            chat(f"What is {i} plus 1?", f"{i + 1}", reasoning_content=f"after {i} " * (1 + i % 5))
            for i in range(60)
        ],
    )


@pytest.fixture
def reason(flags, thoughts):
    """reason(**changes): the command line of a short run."""
    return lambda *switches, **changes: [
        *flags(
            "sft", **{"data_path": thoughts, "format_prompts": 4, "format_tokens": 4, **changes}
        ),
        *switches,
    ]


def packed(path, tokenizer, tmp_path, **options):
    dataset = ReasonDataset(
        path, tokenizer, 96, cache_dir=tmp_path / "cache", num_proc=1, **options
    )
    return PackedBatches(
        dataset,
        batch_size=3,
        accumulation_steps=2,
        max_seq_len=96,
        seed=0,
        epochs=1,
        pad_id=tokenizer.pad_token_id,
    )


# --- the loss ---


class Spy:
    """Collects the micro-batches, the losses and the gradients of a run's steps."""

    def __init__(self, monkeypatch):
        self.micro_batches, self.losses, self.gradients = [], [], []
        run = train_reason.Run
        count, backward, step = run.count_targets, run.backward, run.clip_and_step

        def note_gradients(run, model, *rest):
            self.gradients.append({name: x.grad.clone() for name, x in model.named_parameters()})
            return step(run, model, *rest)

        monkeypatch.setattr(
            run,
            "count_targets",
            lambda *given: self.micro_batches.append(given[1]) or count(*given),
        )
        monkeypatch.setattr(
            run, "backward", lambda *given: self.losses.append(given[1].item()) or backward(*given)
        )
        monkeypatch.setattr(run, "clip_and_step", note_gradients)


def test_with_weight_1_it_is_fine_tuning_bit_for_bit(reason, flags, thoughts, tmp_path):
    train_reason.main(reason(direct_ratio=0, val_ratio=0))
    train_full_sft.main(flags("sft", data_path=thoughts, val_ratio=0, learning_rate=5e-4))
    ours, theirs = tmp_path / "out" / NAME, tmp_path / "out" / "full_sft_32x2"
    assert losses(ours) == losses(theirs) and len(set(losses(ours))) == 8
    assert_same(weights(ours), weights(theirs))


def weighted_mean(network, micro_batches, weight_of):
    """Of -log p over the targets, each document alone through a network of transformers'."""
    nll = weight_sum = 0.0
    for micro in micro_batches:
        rows = zip(micro["input_ids"], micro["labels"], micro["position_ids"])
        for ids, labels, positions in rows:
            starts = [*(positions == 0).nonzero().flatten().tolist(), len(ids)]
            for begin, end in pairwise(starts):
                log_probs = network(ids[None, begin:end]).logits[0, :-1].log_softmax(-1)
                for at, label in enumerate(labels[begin + 1 : end].tolist()):
                    if label != -100:
                        nll = nll - weight_of(label) * log_probs[at, label]
                        weight_sum += weight_of(label)
    return nll / weight_sum


@pytest.mark.parametrize("think_token_weight", [1.0, 7.0, 0.25])
def test_the_loss_is_a_weighted_mean_over_the_step(
    think_token_weight, reason, tokenizer, tmp_path, monkeypatch
):
    """In float64, each token with its own weight: the loss and all gradients."""
    network().save_pretrained(tmp_path / "net")
    tokenizer.save_pretrained(tmp_path / "net")
    spy = Spy(monkeypatch)
    options = dict(max_steps=1, val_ratio=0, accumulation_steps=2, direct_ratio=0.4, max_seq_len=96)
    train_reason.main(
        reason(from_weight=tmp_path / "net", think_token_weight=think_token_weight, **options)
    )
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "net").double()
    think_tokens = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    loss = weighted_mean(
        reference,
        spy.micro_batches[0],
        lambda token: think_token_weight if token in think_tokens else 1.0,
    )
    loss.backward()
    assert losses(tmp_path / "out" / NAME) == [pytest.approx(loss.item(), rel=1e-5)]
    expected = dict(reference.named_parameters())
    for name, gradient in spy.gradients[0].items():
        torch.testing.assert_close(gradient.double(), expected[name].grad, rtol=1e-3, atol=1e-6)


def test_the_weighted_sum_and_its_gradient():
    logits = torch.randn(5, 9, dtype=torch.float64).requires_grad_()
    targets, tokens = torch.tensor([1, 7, 2, 8, 7]), torch.tensor([7, 8])
    ours = train_reason.weighted_nll(logits, targets, tokens, 3.0)
    weights = torch.tensor([1.0, 3, 1, 3, 3])
    theirs = (F.cross_entropy(logits, targets, reduction="none") * weights).sum()
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    gradients = [torch.autograd.grad(x, logits)[0] for x in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


def test_the_balance_loss_is_the_same_for_any_weight(reason, tokenizer, tmp_path, monkeypatch):
    """And that of a plain forward: the mean over documents, weighted by their targets."""
    experts = dict(num_experts=4, num_experts_per_tok=2, router_aux_loss_coef=1.0)
    for name, coefficient in (("with", 1.0), ("without", 0.0)):
        model = network(**{**experts, "router_aux_loss_coef": coefficient})
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    spy, parts = Spy(monkeypatch), []
    for weight in (1.0, 21.0, 0.25):
        for name in ("with", "without"):
            spy.losses.clear()
            options = dict(max_steps=1, val_ratio=0, save_weight=f"{name}{weight}")
            options |= dict(accumulation_steps=2, think_token_weight=weight)
            train_reason.main(reason(from_weight=tmp_path / name, **options))
            parts.append(sum(spy.losses))
    model, micro_batches = network(**experts), spy.micro_batches[0]
    num_targets = sum(int((micro["labels"] != -100).sum()) for micro in micro_batches)
    with torch.no_grad():
        outs = [model(**micro, num_items_in_batch=num_targets) for micro in micro_batches]
    expected = sum(out.aux_loss.item() for out in outs)
    assert expected > 0.9
    for one, other in zip(parts[::2], parts[1::2]):
        assert one - other == pytest.approx(expected, rel=1e-5)


def test_special_tokens_that_people_type_do_not_count(tokenizer, tmp_path):
    path = write(
        tmp_path / "rows.jsonl", [chat("<think>", "</think><think>", reasoning_content="<think>")]
    )
    think_tokens = torch.tensor(train_reason.think_ids(tokenizer))
    for direct_ratio, expected in ((0.0, 2), (1.0, 0)):
        micro_batches = packed(path, tokenizer, tmp_path, direct_ratio=direct_ratio)[0]
        found = [torch.isin(micro["labels"], think_tokens).sum() for micro in micro_batches]
        assert sum(found) == expected


@pytest.mark.parametrize("moe", [0, 1])
def test_the_update_does_not_depend_on_how_the_batch_is_cut(moe, reason, tmp_path):
    results = []
    for batch_size, accumulation_steps in ((12, 1), (4, 3), (3, 4)):
        train_reason.main(
            reason(
                save_dir=tmp_path / f"{batch_size}",
                max_steps=1,
                val_ratio=0,
                use_moe=moe,
                think_token_weight=5,
                batch_size=batch_size,
                accumulation_steps=accumulation_steps,
                direct_ratio=0.5,
            )
        )
        folder = tmp_path / f"{batch_size}" / (NAME + ("_moe" if moe else ""))
        results.append(
            (
                losses(folder),
                weights(folder),
                read_metrics(folder / "metrics.jsonl")[0]["grad_norm"],
            )
        )
    for loss, weight, grad_norm in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-5) and grad_norm == pytest.approx(
            results[0][2], rel=1e-4
        )
        assert_same(weight, results[0][1], exactly=False)


def assert_close_runs(one, two):
    for name, x in weights(one).items():
        torch.testing.assert_close(x, weights(two)[name], rtol=1e-3, atol=2e-5)
    for ours, theirs in zip(
        read_metrics(one / "metrics.jsonl"), read_metrics(two / "metrics.jsonl"), strict=True
    ):
        for name in {
            "loss",
            "val_bpb/held_out",
            "targets",
            "val_format/thinking",
            "val_format/direct",
        } & ours.keys():
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4)


def test_two_ranks_learn_what_one_learns(reason, tmp_path):
    options = dict(think_token_weight=5, direct_ratio=0.5, max_steps=6, epochs=6)
    train_reason.main(reason(save_dir=tmp_path / "one", batch_size=6, **options))
    run_ranks(2, "reason", reason(save_dir=tmp_path / "two", batch_size=3, **options))
    assert_close_runs(tmp_path / "one" / NAME, tmp_path / "two" / NAME)


@needs_deepspeed
def test_sharded_ranks_learn_what_one_learns_and_answer_prompts(reason, tmp_path):
    options = dict(think_token_weight=5, direct_ratio=0.5, max_steps=4, epochs=6)
    train_reason.main(reason(save_dir=tmp_path / "one", batch_size=6, **options))
    run_ranks(
        2,
        "reason",
        reason(
            save_dir=tmp_path / "two", batch_size=3, deepspeed="trainer/ds_zero3.json", **options
        ),
    )
    assert_close_runs(tmp_path / "one" / NAME, tmp_path / "two" / NAME)


def test_an_interrupted_run_resumes_bit_for_bit(reason, tmp_path):
    options = dict(max_steps=10, epochs=5, think_token_weight=3, dropout=0.1)
    train_reason.main(reason(save_dir=tmp_path / "whole", **options))
    interrupt(train_reason, reason(**options))
    with pytest.raises(ValueError, match=r"--think_token_weight 3\.0 -> 4\.0"):
        train_reason.main(reason("--from_resume", **{**options, "think_token_weight": 4}))
    train_reason.main(reason("--from_resume", **options))
    assert_same(weights(tmp_path / "out" / NAME), weights(tmp_path / "whole" / NAME))
    assert metrics(tmp_path / "out" / NAME) == metrics(tmp_path / "whole" / NAME)


# --- the format ---


def test_a_run_comes_to_keep_the_format_and_says_so(reason, tmp_path, capsys):
    rows = write(
        tmp_path / "rows.jsonl",
        [chat(f"What is {i}?", "yes", reasoning_content="look") for i in range(60)],
    )
    train_reason.main(
        reason(
            data_path=rows,
            max_steps=100,
            epochs=60,
            batch_size=4,
            learning_rate=1e-2,
            format_tokens=12,
            val_interval=50,
            format_prompts=3,
        )
    )
    folder = tmp_path / "out" / NAME
    ratios = [
        (row["val_format/thinking"], row["val_format/direct"])
        for row in read_metrics(folder / "metrics.jsonl")
        if "val_format/thinking" in row
    ]
    assert len(ratios) == 2 and ratios[-1] == (1.0, 1.0)
    assert "format kept: 100% thinking, 100% direct" in capsys.readouterr().out
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    for thinking, completion in (
        (True, "look\n</think>\n\nyes<|im_end|>"),
        (False, "yes<|im_end|>"),
        (None, "<think>\nlook\n</think>\n\nyes<|im_end|>"),  # left to itself it reasons
    ):
        question = [{"role": "user", "content": "What is 7?"}]
        ids = torch.tensor([encode_prompt(tokenizer, question, enable_thinking=thinking)])
        out = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
        assert tokenizer.decode(out) == completion


def test_without_prompts_there_are_no_metrics_of_the_format(reason, tmp_path):
    train_reason.main(reason(max_steps=1, save_weight="measured"))
    folder = tmp_path / "out" / "measured_32x2"
    assert read_metrics(folder / "metrics.jsonl")[-1]["val_format/thinking"] == 0
    train_reason.main(reason(max_steps=1, format_prompts=0))
    train_reason.main(reason(max_steps=1, val_ratio=0, save_weight="other"))
    for name, validations in ((NAME, 1), ("other_32x2", 0)):
        lines = read_metrics(tmp_path / "out" / name / "metrics.jsonl")
        rows = [row for row in lines if "loss" not in row]
        assert len(rows) == validations and not any("val_format/thinking" in row for row in rows)


def test_the_default_is_the_toy_worlds_file(flags, capsys):
    train_reason.main(flags("sft", data_path=None, inspect=2, num_hidden_layers=1))
    out = capsys.readouterr().out
    assert "⟦<think>\n" in out or "<think>\n\n</think>\n\n⟦" in out


@pytest.mark.parametrize(
    "flag, value",
    [
        ("--think_token_weight", "0.0"),
        ("--direct_ratio", "1.5"),
        ("--empty_think_ratio", "-1.0"),
        ("--format_prompts", "-1"),
        ("--format_tokens", "0"),
    ],
)
def test_flags_out_of_range_are_refused(flag, value, capsys):
    with pytest.raises(SystemExit):
        parse_args(train_reason.ReasonArgs, [flag, value])
    assert f"{flag} {value}: give" in capsys.readouterr().err

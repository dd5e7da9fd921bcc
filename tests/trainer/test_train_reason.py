"""The reasoning stage: its loss by hand and against fine-tuning, accumulation, ranks, resumption, and the format it measures."""

import importlib.util
import json
from itertools import pairwise

import pytest
import torch
from ranks import run_ranks
from test_stages import assert_same, figures, losses, weights
from transformers import AutoModelForCausalLM, AutoTokenizer

from dataset.chat_format import encode_prompt
from dataset.packing import PackedBatches
from dataset.reason_dataset import ReasonDataset
from model.engine import Engine
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.sampling import SamplingParams
from tests.dataset.rows import chat, write
from trainer import loop, train_full_sft, train_reason
from trainer.arguments import TrainArgs, parse_args
from trainer.metrics import read_metrics
from trainer.run import Run

ROOT = train_reason.ROOT
NAME = "reason_32x2"
needs_deepspeed = pytest.mark.skipif(not importlib.util.find_spec("deepspeed"), reason="DeepSpeed is not installed")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "model")


@pytest.fixture
def thoughts(tmp_path):
    """A file of 60 rows with thoughts of several lengths."""
    return write(tmp_path / "thoughts.jsonl", [
        chat(f"What is {i} plus 1?", f"{i + 1}", reasoning_content=f"after {i} " * (1 + i % 5)) for i in range(60)])


@pytest.fixture
def reason(flags, thoughts):
    """reason(**changes): the command line of a short run."""
    return lambda *switches, **changes: [*flags("sft", **{
        "data_path": thoughts, "format_prompts": 4, "format_tokens": 4, **changes}), *switches]


def network(**changes):
    torch.manual_seed(0)
    return MiniMindForCausalLM(MiniMindConfig(**{**dict(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, intermediate_size=64, qk_norm=True,
        initializer_range=0.2), **changes}))


def packed(path, tokenizer, tmp_path, **options):
    dataset = ReasonDataset(path, tokenizer, 96, cache_dir=tmp_path / "cache", num_proc=1, **options)
    return PackedBatches(dataset, batch_size=3, accumulation_steps=2, max_seq_len=96, seed=0, epochs=1,
                         pad_id=tokenizer.pad_token_id)


# --- the loss ---


def test_with_weight_1_it_is_fine_tuning_bit_for_bit(reason, flags, thoughts, tmp_path):
    train_reason.main(reason(direct_share=0, val_share=0))
    train_full_sft.main(flags("sft", data_path=thoughts, val_share=0, learning_rate=5e-4))
    ours, theirs = tmp_path / "out" / NAME, tmp_path / "out" / "full_sft_32x2"
    assert losses(ours) == losses(theirs) and len(set(losses(ours))) == 8
    assert_same(weights(ours), weights(theirs))


@pytest.mark.parametrize("mark_weight", [1.0, 7.0, 0.25])
def test_the_loss_is_a_weighted_mean_over_the_step(mark_weight, thoughts, tokenizer, tmp_path):
    """Against each sequence alone through transformers' network in float64, every token weighed by what it is."""
    model = network()
    model.save_pretrained(tmp_path / "net")
    micro_batches = packed(thoughts, tokenizer, tmp_path, direct_share=0.4)[0]
    marks = torch.tensor(train_reason.mark_ids(tokenizer))
    num_targets = sum(int((micro["labels"] != -100).sum()) for micro in micro_batches)
    num_marks = train_reason.count_marks(micro_batches, tokenizer)
    total = num_targets + (mark_weight - 1) * num_marks
    loss = sum(train_reason.weighted_loss(model, micro, marks, mark_weight, num_targets, total, 0.0) for micro in micro_batches)
    loss.backward()

    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "net").double()
    nll = weight_sum = 0.0
    for micro in micro_batches:
        for ids, labels, positions in zip(micro["input_ids"], micro["labels"], micro["position_ids"]):
            starts = [*(positions == 0).nonzero().flatten().tolist(), len(ids)]
            for begin, end in pairwise(starts):
                log_probs = reference(ids[None, begin:end]).logits[0, :-1].log_softmax(-1)
                for at, label in enumerate(labels[begin + 1:end].tolist()):
                    if label != -100:
                        weight = mark_weight if tokenizer.convert_ids_to_tokens(label) in ("<think>", "</think>") else 1.0
                        nll, weight_sum = nll - weight * log_probs[at, label], weight_sum + weight
    assert total == weight_sum and 0 < num_marks < num_targets
    assert loss.item() == pytest.approx((nll / weight_sum).item(), rel=1e-5)
    (nll / weight_sum).backward()
    expected = dict(reference.named_parameters())
    for name, x in model.named_parameters():
        torch.testing.assert_close(x.grad.double(), expected[name].grad, rtol=1e-3, atol=1e-6)


def test_the_balance_loss_is_the_same_for_any_weight(thoughts, tokenizer, tmp_path):
    """And that of a plain forward: the mean over documents, weighed by their targets."""
    model = network(num_experts=4, num_experts_per_tok=2, router_aux_loss_coef=1.0)
    micro_batches = packed(thoughts, tokenizer, tmp_path)[0]
    marks = torch.tensor(train_reason.mark_ids(tokenizer))
    num_targets = sum(int((micro["labels"] != -100).sum()) for micro in micro_batches)
    num_marks = train_reason.count_marks(micro_batches, tokenizer)
    expected = sum(model(**micro, num_items_in_batch=num_targets).aux_loss.item() for micro in micro_batches)
    for mark_weight in (1.0, 21.0, 0.25):
        parts = []
        for model.config.router_aux_loss_coef in (1.0, 0.0):
            parts.append(sum(train_reason.weighted_loss(
                model, micro, marks, mark_weight, num_targets, num_targets + (mark_weight - 1) * num_marks,
                model.config.router_aux_loss_coef).item() for micro in micro_batches))
        assert parts[0] - parts[1] == pytest.approx(expected, rel=1e-5) and expected > 0.9


def test_marks_that_people_type_do_not_count(tokenizer, tmp_path):
    path = write(tmp_path / "rows.jsonl", [chat("<think>", "</think><think>", reasoning_content="<think>")])
    assert train_reason.count_marks(packed(path, tokenizer, tmp_path)[0], tokenizer) == 2
    assert train_reason.count_marks(packed(path, tokenizer, tmp_path, direct_share=1.0)[0], tokenizer) == 0


@pytest.mark.parametrize("moe", [0, 1])
def test_the_update_does_not_depend_on_how_the_batch_is_cut(moe, reason, tmp_path):
    results = []
    for batch_size, accumulation_steps in ((12, 1), (4, 3), (3, 4)):
        train_reason.main(reason(save_dir=tmp_path / f"{batch_size}", max_steps=1, val_share=0, use_moe=moe, mark_weight=5,
                                 batch_size=batch_size, accumulation_steps=accumulation_steps, direct_share=0.5))
        folder = tmp_path / f"{batch_size}" / (NAME + ("_moe" if moe else ""))
        results.append((losses(folder), weights(folder), read_metrics(folder / "metrics.jsonl")[0]["grad_norm"]))
    for loss, weight, grad_norm in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-5) and grad_norm == pytest.approx(results[0][2], rel=1e-4)
        assert_same(weight, results[0][1], exactly=False)


def assert_close_runs(one, two):
    for name, x in weights(one).items():
        torch.testing.assert_close(x, weights(two)[name], rtol=1e-3, atol=2e-5)
    for ours, theirs in zip(read_metrics(one / "metrics.jsonl"), read_metrics(two / "metrics.jsonl"), strict=True):
        for name in {"loss", "val_bpb/held_out", "targets", "val_format/thinking", "val_format/direct"} & ours.keys():
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4)


def test_two_ranks_learn_what_one_learns(reason, tmp_path):
    options = dict(mark_weight=5, direct_share=0.5, max_steps=6, epochs=6)
    train_reason.main(reason(save_dir=tmp_path / "one", batch_size=6, **options))
    run_ranks(2, "reason", reason(save_dir=tmp_path / "two", batch_size=3, **options))
    assert_close_runs(tmp_path / "one" / NAME, tmp_path / "two" / NAME)


@needs_deepspeed
def test_sharded_ranks_learn_what_one_learns_and_answer_prompts(reason, tmp_path):
    options = dict(mark_weight=5, direct_share=0.5, max_steps=4, epochs=6)
    train_reason.main(reason(save_dir=tmp_path / "one", batch_size=6, **options))
    run_ranks(2, "reason", reason(save_dir=tmp_path / "two", batch_size=3, deepspeed="trainer/ds_zero3.json", **options))
    assert_close_runs(tmp_path / "one" / NAME, tmp_path / "two" / NAME)


def test_an_interrupted_run_resumes_bit_for_bit(reason, tmp_path, monkeypatch):
    options = dict(max_steps=10, epochs=5, mark_weight=3, dropout=0.1)
    train_reason.main(reason(save_dir=tmp_path / "whole", **options))
    step_of = loop.learning_rate_at

    def cut_at_7(step, *rest):
        if step == 6:
            raise KeyboardInterrupt
        return step_of(step, *rest)

    monkeypatch.setattr(loop, "learning_rate_at", cut_at_7)
    with pytest.raises(KeyboardInterrupt):
        train_reason.main(reason(**options))
    monkeypatch.setattr(loop, "learning_rate_at", step_of)
    with pytest.raises(ValueError, match=r"--mark_weight 3\.0 -> 4\.0"):
        train_reason.main(reason("--from_resume", **{**options, "mark_weight": 4}))
    train_reason.main(reason("--from_resume", **options))
    assert_same(weights(tmp_path / "out" / NAME), weights(tmp_path / "whole" / NAME))
    assert figures(tmp_path / "out" / NAME) == figures(tmp_path / "whole" / NAME)


# --- the format ---


@pytest.mark.parametrize("text, thinking, direct", [
    ("so\n</think>\n\n4.<|im_end|>", True, False), ("4.<|im_end|>", False, True), ("4.", False, True),
    ("so\n</think>\n\n4.", False, False), ("so\n</think>\n\n4.<|endoftext|>", False, False),  # does not end, or not the turn
    ("\n</think>\n\n4.<|im_end|>", False, False), ("so\n</think>\n\n<|im_end|>", False, False),  # nothing thought, or said
    ("so\n</think>\n\n4.</think><|im_end|>", False, False), ("<think>so\n</think>\n\n4.<|im_end|>", False, False),
    ("so <|im_end|>", False, True), ("<think>\nso<|im_end|>", False, False),
    ("<tool_call>\n{}\n</tool_call><|im_end|>", False, True),
    ("so\n</think>\n\n<tool_call>\n{}\n</tool_call><|im_end|>", True, False)])
def test_what_keeps_the_format(text, thinking, direct, tokenizer):
    answer = tokenizer(text).input_ids
    assert train_reason.keeps_format(answer, True, tokenizer) == thinking
    assert train_reason.keeps_format(answer, False, tokenizer) == direct


def test_prompts_of_held_out_rows_are_those_of_the_chat(thoughts, tokenizer, tmp_path):
    """Of both kinds of rows, with any number of turns; with the switch's ends they are what a chat would ask."""
    chats = tmp_path / "chats.jsonl"
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    chats.write_text(json.dumps({"conversations": [*messages, {"role": "assistant", "content": "d"}]}))
    views = [ReasonDataset(path, tokenizer, 96, cache_dir=tmp_path, num_proc=1, direct_share=0.5) for path in (chats, thoughts)]
    prompts = train_reason.bare_prompts(views, tokenizer, 9)
    rows = [json.loads(line)["conversations"][:1] for line in thoughts.read_text().splitlines()]
    assert prompts == [encode_prompt(tokenizer, prompt) for prompt in (messages, *rows[:5])]
    for end, thinking in zip(train_reason.switch_ends(tokenizer), (True, False)):
        assert prompts[0] + end == encode_prompt(tokenizer, messages, enable_thinking=thinking)
    assert train_reason.bare_prompts(views, tokenizer, 1) == prompts[:1]


def test_answers_to_prompts_of_several_lengths_are_the_engines(tokenizer):
    model = network().eval()
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    prompts = [encode_prompt(tokenizer, [{"role": "user", "content": "a " * n}]) for n in (1, 9, 30, 4)]
    run = Run(TrainArgs(device="cpu"))
    answers = train_reason.greedy_ids(model, prompts, 12, run)
    assert answers == [request.sampled for request in Engine(model, tokenizer).generate(
        prompts, SamplingParams(temperature=0, max_tokens=12))]
    first = answers[0].index(answers[0][5])  # as if this token were one that ends an answer
    model.generation_config.eos_token_id = [answers[0][5], tokenizer.pad_token_id]
    assert train_reason.greedy_ids(model, prompts, 12, run)[0] == answers[0][:first + 1]


def test_a_run_comes_to_keep_the_format_and_says_so(reason, tmp_path, capsys):
    rows = write(tmp_path / "rows.jsonl", [chat(f"What is {i}?", "yes", reasoning_content="look") for i in range(60)])
    train_reason.main(reason(data_path=rows, max_steps=100, epochs=60, batch_size=4, learning_rate=1e-2, format_tokens=12,
                             val_interval=50, format_prompts=3))
    folder = tmp_path / "out" / NAME
    shares = [(row["val_format/thinking"], row["val_format/direct"]) for row in read_metrics(folder / "metrics.jsonl")
              if "val_format/thinking" in row]
    assert len(shares) == 2 and shares[-1] == (1.0, 1.0)
    assert "format kept: 100% thinking, 100% direct" in capsys.readouterr().out
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    for thinking, answer in ((True, "look\n</think>\n\nyes<|im_end|>"), (False, "yes<|im_end|>"),
                             (None, "<think>\nlook\n</think>\n\nyes<|im_end|>")):  # left to itself it thinks
        ids = torch.tensor([encode_prompt(tokenizer, [{"role": "user", "content": "What is 7?"}], enable_thinking=thinking)])
        assert tokenizer.decode(model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1]:]) == answer


def test_no_prompts_no_figures(reason, tmp_path):
    train_reason.main(reason(max_steps=1, save_weight="measured"))
    assert read_metrics(tmp_path / "out" / "measured_32x2" / "metrics.jsonl")[-1]["val_format/thinking"] == 0
    train_reason.main(reason(max_steps=1, format_prompts=0))
    train_reason.main(reason(max_steps=1, val_share=0, save_weight="other"))
    for name, validations in ((NAME, 1), ("other_32x2", 0)):
        rows = [row for row in read_metrics(tmp_path / "out" / name / "metrics.jsonl") if "loss" not in row]
        assert len(rows) == validations and not any("val_format/thinking" in row for row in rows)


def test_the_default_is_the_toy_worlds_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train_reason.main(["--inspect", "2", "--from_weight", "none", "--hidden_size", "32", "--num_hidden_layers", "1", "--device",
                       "cpu", "--cache_dir", str(tmp_path)])
    out = capsys.readouterr().out
    assert "⟦<think>\n" in out or "<think>\n\n</think>\n\n⟦" in out


@pytest.mark.parametrize("flag", [["--mark_weight", "0"], ["--direct_share", "1.5"], ["--empty_think_share", "-1"],
                                  ["--format_prompts", "-1"], ["--format_tokens", "0"]])
def test_flags_out_of_range_are_refused(flag, capsys):
    with pytest.raises(SystemExit):
        parse_args(train_reason.ReasonArgs, flag)
    assert f"{flag[0]} {float(flag[1]) if '.' in flag[1] or 'share' in flag[0] or 'weight' in flag[0] else flag[1]}: give" in (
        capsys.readouterr().err)

"""Talking to a model and measuring it from the command line."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import eval_llm
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def out(tmp_path, monkeypatch):
    """A folder with an (untrained) pretrained run and a chat run."""
    monkeypatch.setattr("dataset.lm_dataset.DEFAULT_CACHE", tmp_path / "cache")
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "model")
    template = tokenizer.chat_template
    model = MiniMindForCausalLM(MiniMindConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
                                               intermediate_size=16))
    for name in ("pretrain_16x1", "full_sft_16x1"):
        model.save_pretrained(tmp_path / "out" / name)
        tokenizer.chat_template = template if "sft" in name else None
        tokenizer.save_pretrained(tmp_path / "out" / name)
    torch.save(model.state_dict(), tmp_path / "full_sft_16.pth")
    return tmp_path / "out"


def flags(out, *more):
    return ["--save_dir", str(out), "--device", "cpu", *(() if "bpb" in more else ("--max_new_tokens", "4")), *more]


def test_a_chat_model_gets_the_template_and_a_pretrained_one_the_text(out, monkeypatch):
    seen = []

    def record(model, tokenizer, ids, args, run):
        seen.append(tokenizer.decode(ids))
        return "x", 1.0

    monkeypatch.setattr(eval_llm, "generate", record)
    eval_llm.main(flags(out, "--prompt", "hi"))
    eval_llm.main(flags(out, "--prompt", "hi", "--weight", "pretrain"))
    eval_llm.main(flags(out, "--prompt", "hi", "--open_thinking", "0", "--system", "Be kind."))
    assert seen == ["<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", "<|endoftext|>hi",
                    "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
                    "<think>\n\n</think>\n\n"]


def test_chat_keeps_a_bounded_history_and_forgets_on_request(out, monkeypatch, capsys):
    seen, replies = [], iter("abcde")
    lines = iter(["one", "two", "three", "/new", "four", "/what", "/exit"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    monkeypatch.setattr(eval_llm, "generate",
                        lambda model, tokenizer, ids, args, run: (seen.append(tokenizer.decode(ids)), (next(replies), 1.0))[1])
    eval_llm.main(flags(out, "--historys", "1"))
    contents = [[part.split("<|im_end|>")[0].split("\n", 1)[1] for part in text.split("<|im_start|>")[1:-1]] for text in seen]
    assert contents == [["one"], ["one", "a", "two"], ["two", "b", "three"], ["four"]]
    assert capsys.readouterr().out.count("/new forgets") == 2


def test_one_shot_streams_and_prints_the_speed(out, capsys):
    eval_llm.main(flags(out, "--prompt", "hi", "--temperature", "0"))
    assert "tokens/s]" in capsys.readouterr().out
    eval_llm.main(flags(out, "--test_prompts", "--show_speed", "0"))
    assert capsys.readouterr().out.count("> ") >= len(eval_llm.TEST_PROMPTS)


def test_benchmarks_write_their_figures(out, tmp_path, capsys):
    eval_llm.main(flags(out, "--benchmark", "toy", "--limit", "1", "--json", str(tmp_path / "toy.json")))
    rows = json.loads((tmp_path / "toy.json").read_text())["rows"]
    assert rows[-1]["skill"] == "overall" and {"chance", "low", "high"} <= rows[0].keys()
    data = tmp_path / "text.jsonl"
    data.write_text('{"text": "some words"}\n')
    eval_llm.main(flags(out, "--weight", "pretrain", "--benchmark", "bpb", "--data_path", str(data),
                        "--json", str(tmp_path / "bpb.json")))
    row, = json.loads((tmp_path / "bpb.json").read_text())["rows"]
    assert row["bytes"] == 10 and 0 < row["bpb"] < 20
    assert "bits per byte" in capsys.readouterr().out


def test_thinking_is_not_seen_by_later_rounds(out, monkeypatch):
    seen, lines = [], iter(["one", "two", "/exit"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    monkeypatch.setattr(eval_llm, "generate", lambda model, tokenizer, ids, args, run: (
        seen.append(tokenizer.decode(ids)), ("why\n</think>\n\nyes", 1.0))[1])
    eval_llm.main(flags(out, "--open_thinking"))
    assert seen[1] == ("<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
                       "<|im_start|>user\ntwo<|im_end|>\n<|im_start|>assistant\n<think>\n")


def test_older_pth_files_load_with_what_they_had_otherwise(tmp_path, out, monkeypatch):
    from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
    from trainer.weights import legacy_config

    args = eval_llm.parse_args(eval_llm.EvalArgs, ["--preset", "tiny"])
    args.preset = "minimind-3-moe"
    assert legacy_config(args, torch.device("cpu"), 6400).norm_topk_prob
    args.preset = "minimind2-small"
    assert legacy_config(args, torch.device("cpu"), 6400).rms_norm_eps == 1e-5
    torch.manual_seed(0)
    model = MiniMindForCausalLM(MiniMindConfig.from_preset("tiny")).eval()
    torch.save({name: x.half() for name, x in model.state_dict().items()}, tmp_path / "chat.pth")
    loaded = []
    monkeypatch.setattr(eval_llm, "answer", lambda model, *rest: loaded.append(model) or [])
    eval_llm.main(flags(out, "--weight", str(tmp_path / "chat.pth"), "--preset", "tiny", "--prompt", "hi"))
    ids = torch.arange(1, 9)[None]
    torch.testing.assert_close(loaded[0](ids).logits, model(ids).logits, rtol=1e-2, atol=1e-2)


def test_pth_files_need_their_shape(out, tmp_path):
    path = str(tmp_path / "full_sft_16.pth")
    with pytest.raises(ValueError, match="does not fit the network"):
        eval_llm.main(flags(out, "--weight", path, "--prompt", "hi", "--preset", "minimind2-small"))


@pytest.mark.parametrize("written, message", [
    (["--weight", "dpo"], "no weights are found as 'dpo'"), (["--weight", "pretrain", "--benchmark", "toy"], "only pretrained"),
    (["--weight", "pretrain", "--mode", "chat"], "has no chat template")])
def test_what_cannot_work_says_why(out, written, message):
    with pytest.raises(ValueError, match=message):
        eval_llm.main(flags(out, *written))


@pytest.mark.parametrize("written, message", [
    (["--top_p", "0"], "--top_p 0.0"), (["--benchmark", "bpb"], "needs --data_path"),
    (["--data_path", "x"], "--data_path has an effect with --benchmark bpb only"),
    (["--benchmark", "toy", "--prompt", "x"], "--prompt has an effect with talking only"),
    (["--limit", "3"], "--limit has an effect with --benchmark toy only"), (["--json", "x"], "--json has an effect with"),
    (["--test_prompts", "--prompt", "x"], "choose one"), (["--temperature", "-1"], "0 or more")])
def test_contradictory_flags_are_refused(written, message, capsys):
    with pytest.raises(SystemExit):
        eval_llm.main(written)
    assert message in capsys.readouterr().err

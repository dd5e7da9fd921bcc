"""Talking to a model and measuring it from the command line."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer

import eval_llm
from model.model_lora import AdapterOnly, LoRASettings, adapter_names, add_adapter, merge_adapter
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.reward_model import MiniMindForSequenceClassification
from scripts.terminal_chat import Talk
from tests.helpers.other_tokenizer import trained_network, write_other_tokenizer
from trainer.runtime.weights import find_weight

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def out(tmp_path, monkeypatch):
    """A folder with an (untrained) pretrained run and a chat run."""
    monkeypatch.setattr("dataset.token_dataset.DEFAULT_CACHE", tmp_path / "cache")
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "model")
    template = tokenizer.chat_template
    model = MiniMindForCausalLM(
        MiniMindConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=16,
        )
    )
    for name in ("pretrain_16x1", "full_sft_16x1"):
        model.save_pretrained(tmp_path / "out" / name)
        tokenizer.chat_template = template if "sft" in name else None
        tokenizer.save_pretrained(tmp_path / "out" / name)
    return tmp_path / "out"


def fake_replies(monkeypatch, replies):
    """Let the engine answer with these texts; returns the list that the prompts, as text, will be
    added to.
    """
    seen, replies = [], iter(replies)

    def generate(talk, prompt):
        seen.append(talk.tokenizer.decode(prompt))
        return SimpleNamespace(text=next(replies), sampled=[1])

    monkeypatch.setattr(Talk, "generate", generate)
    return seen


def type_lines(monkeypatch, *lines):
    lines = iter(lines)
    monkeypatch.setattr("builtins.input", lambda _: next(lines))


def flags(out, *more):
    return [
        "--save_dir",
        str(out),
        "--device",
        "cpu",
        *(() if "bpb" in more else ("--max_new_tokens", "4")),
        *more,
    ]


def test_a_chat_model_gets_the_template_and_a_pretrained_one_the_text(out, monkeypatch):
    seen = fake_replies(monkeypatch, "xxx")
    eval_llm.main(flags(out, "--prompt", "hi"))
    eval_llm.main(flags(out, "--prompt", "hi", "--weight", "pretrain"))
    eval_llm.main(flags(out, "--prompt", "hi", "--open_thinking", "0", "--system", "Be kind."))
    assert seen == [
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
        "<|endoftext|>hi",
        "<|im_start|>system\nBe "
        "kind.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
        "<think>\n\n</think>\n\n",
    ]


def test_chat_keeps_a_bounded_history_and_forgets_on_request(out, monkeypatch, capsys):
    seen = fake_replies(monkeypatch, "abcde")
    type_lines(monkeypatch, "one", "two", "three", "/reset", "four", "/what", "/exit")
    eval_llm.main(flags(out, "--historys", "1"))
    contents = [
        [part.split("<|im_end|>")[0].split("\n", 1)[1] for part in text.split("<|im_start|>")[1:-1]]
        for text in seen
    ]
    assert contents == [["one"], ["one", "a", "two"], ["two", "b", "three"], ["four"]]
    out = capsys.readouterr().out
    assert (
        out.count("/reset ") == 2
        and "[not understood: /what]\n" in out
        and "[the conversation is forgotten]" in out
    )


def test_commands_of_the_chat(out, tmp_path, monkeypatch, capsys):
    seen = fake_replies(monkeypatch, ["yes", "why\n</think>\n\nno", "ok", "ok"])
    saved = tmp_path / "saved.jsonl"
    type_lines(
        monkeypatch,
        "/save x",
        "/system Be kind.",
        "/system",
        "one\\",
        "more",
        "/think on",
        "two",
        f"/save {saved}",
        "/think maybe",
        "/think off",
        "/reset",
        '"""a',
        "",
        'b"""',
        "/think auto",
        "/new",
        "three",
        "/exit",
    )
    eval_llm.main(flags(out))
    turns = [
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\n",
    ]
    assert seen == [
        f"{turns[0]}one\nmore{turns[1]}",
        f"{turns[0]}one\nmore{turns[1]}yes<|im_end|>\n<|im_start|>user\ntwo{turns[1]}<think>\n",
        f"{turns[0]}a\n\nb{turns[1]}<think>\n\n</think>\n\n",
        f"{turns[0]}three{turns[1]}",
    ]
    row = json.loads(saved.read_text())
    assert [message["role"] for message in row["conversations"]] == [
        "system",
        "user",
        "assistant",
        "user",
        "assistant",
    ]
    assert row["conversations"][-1] == {
        "role": "assistant",
        "content": "no",
        "reasoning_content": "\nwhy\n",
    }
    printed = capsys.readouterr().out
    assert (
        "nothing to save" in printed
        and "[system prompt: Be kind.]" in printed
        and "[system prompt: Be kind.; the " in printed
    )
    assert printed.count("/think on|off") == 2


def test_ctrl_c_stops_an_answer_and_the_chat_goes_on(out, monkeypatch, capsys):
    from model.engine import Engine

    step, steps = Engine.step, []

    def interrupted(engine):
        steps.append(engine)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return step(engine)

    monkeypatch.setattr(Engine, "step", interrupted)
    type_lines(monkeypatch, "one", "two", "/exit")
    eval_llm.main(flags(out, "--max_new_tokens", "9"))
    printed = capsys.readouterr().out
    assert "[stopped; this round is forgotten]" in printed and printed.count("tokens/s]") == 1
    assert steps[0].num_unfinished == 0


def test_a_conversation_that_is_too_long_is_said(out, monkeypatch, capsys):
    monkeypatch.setattr("scripts.terminal_chat.MAX_LEN", 20)
    type_lines(monkeypatch, "word " * 40, "/exit")
    eval_llm.main(flags(out))
    assert "20 is the most for prompt and completion" in capsys.readouterr().out


def adapter(folder, base, seed):
    """Save a random adapter of a network and return the folder."""
    model, settings = MiniMindForCausalLM.from_pretrained(base), LoRASettings(rank=2, alpha=200)
    torch.manual_seed(seed)
    add_adapter(model, settings)
    with torch.no_grad():
        for x in model.parameters():
            x.add_(torch.randn_like(x) if x.requires_grad else 0)
    AdapterOnly(model, settings, base).save_pretrained(folder)
    return str(folder)


def test_adapters_are_added_up_and_switched_in_the_chat(out, tmp_path, monkeypatch, capsys):
    base = out / "full_sft_16x1"
    one, two = (adapter(tmp_path / name, base, seed) for seed, name in enumerate(("one", "two.1")))
    answers, generate = [], Talk.generate
    monkeypatch.setattr(
        Talk, "generate", lambda talk, prompt: answers.append(generate(talk, prompt)) or answers[-1]
    )
    greedy = ("--temperature", "0", "--show_speed", "0")
    expected = {}
    for name, folders in (
        ("none", []),
        ("one", [one]),
        ("two_1", [two]),
        ("one two_1", [one, two]),
    ):
        eval_llm.main(
            flags(out, "--prompt", "hi", *greedy, *(["--adapter", *folders] if folders else []))
        )
        expected[name] = answers.pop().sampled
        merged = merge_adapter(MiniMindForCausalLM.from_pretrained(base), *folders)
        prompt = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
        ids = torch.tensor([AutoTokenizer.from_pretrained(base)(prompt).input_ids])
        text = merged.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=[0, 2])[
            0, ids.shape[1] :
        ].tolist()
        assert expected[name] == text[: len(expected[name])]
    assert len(set(map(tuple, expected.values()))) == 4
    names = ["two_1", "none", "one", "one two_1", "three"]
    type_lines(
        monkeypatch,
        "hi",
        *(line for name in names for line in (f"/adapter {name}", "/reset", "hi")),
        "/exit",
    )
    eval_llm.main(flags(out, *greedy, "--adapter", one, two))
    assert [answer.sampled for answer in answers] == [
        expected[name] for name in ("one two_1", *names[:-1], "one two_1")
    ]
    said = capsys.readouterr().out
    assert (
        "[adapter: two_1]" in said
        and "[there is no adapter 'three'; there are: one, two_1]" in said
    )


def test_adapters_of_any_folder_names_get_names(out, tmp_path, monkeypatch, capsys):
    base = out / "full_sft_16x1"
    folders = [
        adapter(tmp_path / name, base, seed)
        for seed, name in enumerate(("lora", "more/lora", "train"))
    ]
    type_lines(monkeypatch, "/adapter lora-2 adapter-train", "/adapter x", "/exit")
    eval_llm.main(flags(out, "--adapter", *folders))
    said = capsys.readouterr().out
    assert (
        "[adapter: lora-2 adapter-train]" in said
        and "there are: lora, lora-2, adapter-train]" in said
    )


def test_a_reward_model_is_named(out):
    model = MiniMindForCausalLM.from_pretrained(out / "full_sft_16x1")
    MiniMindForSequenceClassification.from_causal_lm(model).save_pretrained(out / "reward_16x1")
    with pytest.raises(
        ValueError, match=r"reward_16x1 is a reward model, .*: give a language model"
    ):
        eval_llm.main(flags(out, "--weight", "reward", "--prompt", "hi"))


def test_an_adapter_in_place_of_a_network_is_named(out, tmp_path):
    folder = adapter(out / "lora_16x1", out / "full_sft_16x1", 0)
    for name in ("lora", folder):
        with pytest.raises(
            ValueError,
            match=r"lora_16x1 is an adapter.*give .*full_sft_16x1, and the adapter as --adapter",
        ):
            eval_llm.main(flags(out, "--weight", name, "--prompt", "hi"))


def test_answers_are_searched_for_their_keyword(out, tmp_path, monkeypatch, capsys):
    rows = [
        {
            "conversations": [
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": "a"},
            ],
            "keyword": keyword,
            "skill": skill,
        }
        for keyword, skill in (("honey", "medical"), ("ice", "medical"), ("Nova", "identity"))
    ]
    data, figures = tmp_path / "rows.jsonl", tmp_path / "figures.json"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(
        "scripts.toy_benchmark.continuations",
        lambda engine, prompts, params: ["Some Honey.", "Nice.", "I am Nova."],
    )
    eval_llm.main(
        flags(out, "--benchmark", "keyword", "--data_path", str(data), "--json", str(figures))
    )
    found = {row["skill"]: row["accuracy"] for row in json.loads(figures.read_text())["rows"]}
    assert found == {"medical": 0.5, "identity": 1.0, "overall": pytest.approx(2 / 3)}
    assert "medical" in capsys.readouterr().out


def test_one_shot_streams_and_prints_the_speed(out, capsys):
    eval_llm.main(flags(out, "--prompt", "hi", "--temperature", "0"))
    assert "tokens/s]" in capsys.readouterr().out
    eval_llm.main(flags(out, "--test_prompts", "--show_speed", "0"))
    assert capsys.readouterr().out.count("> ") >= len(eval_llm.TEST_PROMPTS)


def test_benchmarks_write_their_figures(out, tmp_path, capsys):
    eval_llm.main(
        flags(out, "--benchmark", "toy", "--limit", "1", "--json", str(tmp_path / "toy.json"))
    )
    rows = json.loads((tmp_path / "toy.json").read_text())["rows"]
    assert rows[-1]["skill"] == "overall" and {"chance", "low", "high"} <= rows[0].keys()
    data = tmp_path / "text.jsonl"
    data.write_text('{"text": "some words"}\n')
    eval_llm.main(
        flags(
            out,
            "--weight",
            "pretrain",
            "--benchmark",
            "bpb",
            "--data_path",
            str(data),
            "--json",
            str(tmp_path / "bpb.json"),
        )
    )
    (row,) = json.loads((tmp_path / "bpb.json").read_text())["rows"]
    assert row["bytes"] == 10 and 0 < row["bpb"] < 20
    assert "bits per byte" in capsys.readouterr().out


def test_thinking_is_not_seen_by_later_rounds(out, monkeypatch):
    seen = fake_replies(monkeypatch, ["why\n</think>\n\nyes"] * 2)
    type_lines(monkeypatch, "one", "two", "/exit")
    eval_llm.main(flags(out, "--open_thinking"))
    assert seen[1] == (
        "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
        "<|im_start|>user\ntwo<|im_end|>\n<|im_start|>assistant\n<think>\n"
    )


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A folder as another repository has it: out/full_sft_64.pth, and its tokenizer in model/."""
    folder = tmp_path_factory.mktemp("theirs")
    tokenizer = write_other_tokenizer(folder / "model")
    model = trained_network(tokenizer)
    (folder / "out").mkdir()
    half = {name: x.half() for name, x in model.state_dict().items()}
    torch.save(half, folder / "out" / "full_sft_64.pth")
    layer = "model.layers.0.self_attn.o_proj.lora."
    lora = {f"{layer}A.weight": torch.ones(2, 64), f"{layer}B.weight": torch.ones(64, 2)}
    torch.save(lora, folder / "out" / "lora_identity_64.pth")
    return folder


@pytest.mark.parametrize(
    "written",
    [
        [],
        ["--hidden_size", "64"],
        ["--hidden_size", "64", "--num_hidden_layers", "1", "--use_moe", "0"],
        ["--load_from", "MODEL", "--weight", "full_sft"],
        ["--lora_weight", "None"],
    ],
)
def test_pth_files_load_by_their_name_with_the_tokenizer_of_their_own(written, theirs, monkeypatch):
    loaded = []
    monkeypatch.setattr(Talk, "answer", lambda talk, text: loaded.append(talk))
    written = [word.replace("MODEL", str(theirs / "model")) for word in written]
    eval_llm.main(["--save_dir", str(theirs / "out"), "--prompt", "hi", *written])
    ids, model = torch.arange(1, 9)[None], trained_network(theirs / "model")
    own = loaded[0].engine.model(ids).logits
    torch.testing.assert_close(own, model(ids).logits, rtol=1e-1, atol=1e-1)
    vocabulary = AutoTokenizer.from_pretrained(theirs / "model").get_vocab()
    assert loaded[0].engine.tokenizer.get_vocab() == vocabulary


def test_adapters_are_found_by_name_and_long_contexts_asked_for(theirs, monkeypatch):
    loaded = []
    monkeypatch.setattr(Talk, "answer", lambda talk, text: loaded.append(talk.engine.model))
    common = ["--save_dir", str(theirs / "out"), "--prompt", "hi"]
    eval_llm.main([*common, "--lora_weight", "lora_identity", "--inference_rope_scaling"])
    assert adapter_names(loaded[0]) == ["lora_identity_64"]
    rope = loaded[0].config.rope_parameters
    assert (rope["rope_type"], rope["factor"], rope["attention_factor"]) == ("yarn", 16, 1)
    eval_llm.main([*common, "--load_from", str(theirs / "model")])
    assert loaded[1].config.rope_parameters["rope_type"] == "default"


@pytest.mark.parametrize(
    "written, message",
    [
        (["--preset", "minimind2-small"], r"full_sft_64\.pth is a 64x1, but --preset minimind2-"),
        (["--num_hidden_layers", "2", "--hidden_size", "64"], "but --num_hidden_layers 2 asks"),
    ],
)
def test_a_pth_file_decides_its_shape(written, message, theirs):
    path = str(theirs / "out" / "full_sft_64.pth")
    with pytest.raises(ValueError, match=message):
        eval_llm.main(["--weight", path, "--prompt", "hi", *written])


@pytest.mark.parametrize(
    "written, message",
    [
        (["--load_from", "OUT/full_sft_16x1", "--weight", "x"], "both name the model: leave one"),
        (["--load_from", "OUT"], "it has neither config.json nor tokenizer.json"),
    ],
)
def test_load_from_that_names_nothing_is_refused(written, message, out, capsys):
    with pytest.raises(SystemExit):
        eval_llm.main([word.replace("OUT", str(out)) for word in written])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "written, message",
    [
        (["--weight", "dpo"], "no weights are found as 'dpo'"),
        (["--weight", "pretrain", "--benchmark", "toy"], "only pretrained"),
        (["--weight", "pretrain", "--mode", "chat"], "has no chat template"),
    ],
)
def test_what_cannot_work_says_why(out, written, message):
    with pytest.raises(ValueError, match=message):
        eval_llm.main(flags(out, *written))


@pytest.mark.parametrize(
    "written, message",
    [
        (["--top_p", "0"], "--top_p 0.0"),
        (["--benchmark", "bpb"], "needs --data_path"),
        (
            ["--data_path", "x"],
            "--data_path has an effect with --benchmark bpb or --benchmark keyword only",
        ),
        (["--benchmark", "toy", "--prompt", "x"], "--prompt has an effect with talking only"),
        (["--limit", "3"], "--limit has an effect with --benchmark toy only"),
        (["--json", "x"], "--json has an effect with"),
        (["--test_prompts", "--prompt", "x"], "choose one"),
        (["--temperature", "-1"], "0 or more"),
    ],
)
def test_contradictory_flags_are_refused(written, message, capsys):
    with pytest.raises(SystemExit):
        eval_llm.main(written)
    assert message in capsys.readouterr().err


def test_a_folder_of_another_class_loads_without_running_its_code(theirs, tmp_path, monkeypatch):
    folder = tmp_path / "minimind-3"
    shutil.copytree(theirs / "model", folder)
    state = torch.load(theirs / "out" / "full_sft_64.pth", weights_only=True)
    torch.save(state, folder / "pytorch_model.bin")
    shape = trained_network(theirs / "model").config
    names = "hidden_size num_hidden_layers num_attention_heads num_key_value_heads vocab_size"
    config = {name: getattr(shape, name) for name in names.split()}
    config |= {"model_type": "minimind", "use_moe": False, "intermediate_size": 128}
    config["auto_map"] = {
        "AutoConfig": "model_minimind.MiniMindConfig",
        "AutoModelForCausalLM": "model_minimind.MiniMindForCausalLM",
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    trap = f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n"
    (folder / "model_minimind.py").write_text(trap, encoding="utf-8")
    loaded = []
    monkeypatch.setattr(Talk, "answer", lambda talk, text: loaded.append(talk.engine.model))
    eval_llm.main(["--load_from", str(folder), "--prompt", "hi"])
    ids, model = torch.arange(1, 9)[None], trained_network(theirs / "model")
    torch.testing.assert_close(loaded[0](ids).logits, model(ids).logits, rtol=1e-1, atol=1e-1)
    assert not (tmp_path / "ran").exists()


def test_names_of_pth_files(tmp_path):
    def found(name, **given):
        args = eval_llm.EvalArgs(save_dir=str(tmp_path), **given)
        args.given = set(given)
        return find_weight(name, args, torch.device("cpu")).name

    for name in ("full_sft_256.pth", "full_sft_256_moe.pth", "full_sft_512.pth", "dpo_512_moe.pth"):
        (tmp_path / name).touch()
    longer = tmp_path / "full_sft_v2_tiny"  # of another run, full_sft_v2
    longer.mkdir()
    (longer / "config.json").touch()
    assert found("full_sft", hidden_size=256) == "full_sft_256.pth"
    assert found("full_sft", hidden_size=256, use_moe=True) == "full_sft_256_moe.pth"
    assert found("full_sft_256_moe") == "full_sft_256_moe.pth"
    assert found("dpo") == found("dpo", hidden_size=512) == "dpo_512_moe.pth"
    assert found("full_sft_v2") == "full_sft_v2_tiny"
    with pytest.raises(ValueError, match=r"full_sft_512\.pth, .*say which"):
        found("full_sft")


def test_a_pretrained_pth_file_continues_the_text(theirs, tmp_path, monkeypatch):
    shutil.copytree(theirs / "model", tmp_path / "model")
    (tmp_path / "out").mkdir()
    shutil.copy(theirs / "out" / "full_sft_64.pth", tmp_path / "out" / "pretrain_64.pth")
    chats = []
    monkeypatch.setattr(Talk, "answer", lambda talk, text: chats.append(talk.chats))
    eval_llm.main(["--save_dir", str(tmp_path / "out"), "--weight", "pretrain", "--prompt", "hi"])
    assert chats == [False]

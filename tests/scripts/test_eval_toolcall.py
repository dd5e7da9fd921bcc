"""The measure of tool use: what a scripted model gets for right, wrong, broken and missing calls,
on all kinds of questions.
"""

import json

import pytest
import torch
from transformers import AutoTokenizer

from dataset.chat.final_answer import contains
from dataset.files.jsonl import in_fraction
from dataset.toy.rows import agent_row
from dataset.toy.scorer import wilson
from dataset.toy.tools import run_tool
from dataset.toy.world import make_world
from model.model_lora import AdapterOnly, LoRASettings, add_adapter, merge_adapter
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from scripts import eval_toolcall, toy_benchmark
from scripts.tool_eval.verdicts import same_calls
from scripts.toy_benchmark import evaluation_engine
from tests.helpers.own_tools import write_tools

ITEMS = list(make_world("mini").items("sft", "tools", "heldout", 24))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A network that can chat; what it says is scripted."""
    folder = tmp_path_factory.mktemp("net") / "chat_16x1"
    torch.manual_seed(0)
    MiniMindForCausalLM(
        MiniMindConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=16,
        )
    ).save_pretrained(folder)
    AutoTokenizer.from_pretrained(eval_toolcall.ROOT / "model").save_pretrained(folder)
    return folder


@pytest.fixture
def says(folder, monkeypatch):
    """says(function): the model's reply to a prompt, given as text; returns the prompts that it
    sees.
    """

    def script(reply):
        prompts = []

        def texts(engine, ids, params):
            seen = [engine.tokenizer.decode(one) for one in ids]
            prompts.extend(seen)
            return [reply(prompt) for prompt in seen]

        monkeypatch.setattr(toy_benchmark, "continuations", texts)
        return prompts

    return script


def block(name, arguments):
    call = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>\n{call}\n</tool_call>"


def right_reply(prompt):
    """What a perfect model says."""
    turn = next(
        item.turns[0] for item in ITEMS if f"user\n{item.turns[0].question}<|im_end|>" in prompt
    )
    return (
        turn.reply
        if "<tool_response>" in prompt
        else "\n".join(block(call.name, call.arguments) for call in turn.calls)
    )


def run(folder, tmp_path, *flags, limit=24):
    figures = tmp_path / "figures.json"
    eval_toolcall.main(
        [
            "--weight",
            str(folder),
            "--device",
            "cpu",
            "--json",
            str(figures),
            "--limit",
            str(limit),
            *map(str, flags),
        ]
    )
    return {row["tool"]: row for row in json.loads(figures.read_text())["rows"]}


def test_a_perfect_model(folder, says, tmp_path, capsys):
    prompts = says(right_reply)
    rows = run(folder, tmp_path, "--without_tools")
    count = {
        name: sum(item.turns[0].calls[0].name == name for item in ITEMS)
        for name in rows
        if name != "overall"
    }
    assert sum(count.values()) == 24 and set(count) == {
        item.turns[0].calls[0].name for item in ITEMS
    }
    for name, row in rows.items():
        n = count.get(name, 24)
        low, high = wilson(n, n)
        assert row == {
            "tool": name,
            "n": n,
            "success": 1,
            "low": low,
            "high": high,
            "exact": 1,
            "no_call": 0,
            "calls": n,
            "invalid": 0,
            "without_tools": 0,
        }
    table = capsys.readouterr().out
    assert table.splitlines()[0].split() == [
        "tool",
        "n",
        "success",
        "low",
        "high",
        "exact",
        "no",
        "call",
        "invalid",
        "without",
        "tools",
    ]
    assert len(prompts) == 3 * 24 and sum("# Tools" in prompt for prompt in prompts) == 2 * 24


def test_each_fault_is_counted_for_what_it_is(folder, says, tmp_path):
    """One kind of fault for each sixth of the questions; the rest is right."""
    faults = [
        lambda call: "I do not know.",
        lambda call: "<tool_call>\n{broken\n</tool_call>",
        lambda call: block("nothing", {}),
        lambda call: block(call.name, {"x": 1}),
        lambda call: block(call.name, {**call.arguments, "city": "Rome"}),
        None,
    ]

    def reply(prompt):
        index = next(
            i
            for i, item in enumerate(ITEMS)
            if f"user\n{item.turns[0].question}<|im_end|>" in prompt
        )
        fault = faults[index % 6]
        if fault is None or "<tool_response>" in prompt:
            return right_reply(prompt)
        return fault(ITEMS[index].turns[0].calls[0])

    says(reply)
    row = run(folder, tmp_path)["overall"]
    other_city = sum(set(item.turns[0].calls[0].arguments) == {"city"} for item in ITEMS[4::6])
    assert (
        0 < other_city < 4
    )  # calls that can be made, but are not the right ones; to the rest the city is too much
    assert row["success"] == row["exact"] == 4 / 24 and row["no_call"] == 4 / 24
    assert row["calls"] == 20 and row["invalid"] == (4 + 4 + 4 + 4 - other_city) / 20


def test_a_call_that_is_made_again_until_it_is_right_is_no_exact_one(folder, says, tmp_path):
    def reply(prompt):
        return (
            right_reply(prompt)
            if "<tool_response>" not in prompt
            else (
                right_reply(prompt)
                if prompt.count("<tool_response>") > 1
                else right_reply(prompt.replace("<tool_response>", ""))
            )
        )

    says(reply)
    row = run(folder, tmp_path)["overall"]
    assert row["success"] == 1 and row["exact"] == 0 and row["calls"] == 48 and row["invalid"] == 0
    row = run(folder, tmp_path, "--max_rounds", 1)["overall"]
    assert row["success"] == 0


def test_the_answer_must_be_right_too(folder, says, tmp_path, capsys):
    says(lambda prompt: "It is -1." if "<tool_response>" in prompt else right_reply(prompt))
    row = run(folder, tmp_path, "--show", "2")["overall"]
    out = capsys.readouterr().out
    assert (
        row["success"] == 0
        and row["exact"] == 1
        and out.count("assistant: It is -1.") == 2 == out.count("was expected")
    )
    call = ITEMS[0].turns[0].calls[0]
    assert f"assistant calls: {call.name}({json.dumps(call.arguments, ensure_ascii=False)})" in out
    assert f"tool: {run_tool(call.name, call.arguments)}" in out


def test_thinking_is_opened_by_the_prompt_and_is_no_answer(folder, says, tmp_path):
    prompts = says(lambda prompt: "Which?\n</think>\n\n" + right_reply(prompt))
    assert run(folder, tmp_path, "--open_thinking", 1)["overall"]["success"] == 1
    assert (
        all(prompt.endswith("assistant\n<think>\n") for prompt in prompts)
        and "<think>\nWhich?\n</think>" in prompts[-1]
    )
    says(lambda prompt: right_reply(prompt))  # never ends to think
    assert run(folder, tmp_path, "--open_thinking", 1)["overall"]["no_call"] == 1
    prompts = says(lambda prompt: right_reply(prompt))
    assert run(folder, tmp_path, "--open_thinking", 0)["overall"]["success"] == 1
    assert all(prompt.endswith("<think>\n\n</think>\n\n") for prompt in prompts)


# --- a file of questions ---


def test_a_file_of_agent_rows(folder, says, tmp_path):
    path = tmp_path / "agent.jsonl"
    path.write_text("".join(json.dumps(agent_row(item, None)) + "\n" for item in ITEMS))
    says(right_reply)
    rows = run(folder, tmp_path, "--data_path", path)
    assert (
        rows["overall"]["success"] == rows["overall"]["exact"] == 1 and rows["overall"]["n"] == 24
    )
    assert run(folder, tmp_path, "--data_path", path, limit=3)["overall"]["n"] == 3


def test_own_tools_and_rows_that_only_say_what_the_answer_holds(folder, says, tmp_path):
    schema = {
        "name": "multiply",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    }
    system = {"role": "system", "content": "Be brief.", "tools": [schema]}
    rows = [
        {"conversations": [system, {"role": "user", "content": "What?"}], "gt": gt}
        for gt in (["372"], ["Rome", "372"], ["37"], ["372", "Paris"])
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = says(
        lambda prompt: (
            "In Rome it is 372."
            if "<tool_response>" in prompt
            else block("multiply", {"a": 12, "b": 31})
        )
    )
    row = run(folder, tmp_path, "--data_path", path, "--tools", write_tools(tmp_path))
    assert (
        list(row) == ["any", "overall"]
        and row["overall"]["success"] == 0.5
        and row["overall"]["invalid"] == 0
    )
    assert (
        '{"result": 372}' in prompts[-1]
        and "Be brief." in prompts[-1]
        and '"multiply"' in prompts[0]
    )


POST = '''
from dataset.chat.tools import tool

@tool
def send(to: str) -> str:
    """Send a letter.

    Args:
        to: To whom.
    """
    open("SENT", "a").write(to)
    return "sent"
'''


def test_expected_calls_are_not_made_but_compared(folder, says, tmp_path):
    """The tools are the user's: only what the model calls is run."""
    (tmp_path / "post.py").write_text(POST.replace("SENT", str(tmp_path / "sent")))
    system = {"role": "system", "content": "", "tools": [{"name": "send"}]}
    row = {
        "conversations": [system, {"role": "user", "content": "Write!"}],
        "gt": ["yes"],
        "calls": [{"name": "send", "arguments": {"to": "bob"}}],
    }
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    flags = ["--data_path", tmp_path / "rows.jsonl", "--tools", tmp_path / "post.py"]
    says(lambda prompt: "I will not.")
    figures = run(folder, tmp_path, *flags)["send"]
    assert figures["no_call"] == 1 and figures["exact"] == 0 and not (tmp_path / "sent").exists()
    says(lambda prompt: "yes" if "<tool_response>" in prompt else block("send", {"to": "bob"}))
    figures = run(folder, tmp_path, *flags)["send"]
    assert figures["success"] == figures["exact"] == 1 and (tmp_path / "sent").read_text() == "bob"


def test_a_fraction_of_a_file(folder, says, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({**GOOD, "gt": [f"{i}"]}) + "\n" for i in range(1, 101)))
    says(lambda prompt: "21")
    row = run(folder, tmp_path, "--data_path", f"{path}@0.1", limit=100)["overall"]
    assert (
        row["n"] == sum(in_fraction(i, 0.1) for i in range(1, 101)) == 10
        and row["success"] == in_fraction(21, 0.1) / 10
    )
    with pytest.raises(ValueError, match=r"rows.jsonl@1e-9: there is no row in that fraction"):
        run(folder, tmp_path, "--data_path", f"{path}@1e-9")


def test_adapters_change_what_it_says(folder, says, tmp_path, monkeypatch):
    """Two of them, one after the other, reach the network as in eval_llm.py."""
    engines = []
    monkeypatch.setattr(
        toy_benchmark,
        "evaluation_engine",
        lambda model, *rest: engines.append(model) or evaluation_engine(model, *rest),
    )
    says(right_reply)
    for seed, name in enumerate(("one", "two")):
        model = MiniMindForCausalLM.from_pretrained(folder)
        torch.manual_seed(seed)
        add_adapter(model, LoRASettings(rank=2))
        for x in model.parameters():
            if x.requires_grad:
                x.data.add_(torch.randn_like(x))
        AdapterOnly(model, LoRASettings(rank=2), folder).save_pretrained(tmp_path / name)
    for folders in ([], [tmp_path / "one"], [tmp_path / "one", tmp_path / "two"]):
        run(folder, tmp_path, *(["--adapter", *folders] if folders else []), limit=1)
        expected = MiniMindForCausalLM.from_pretrained(folder)
        merge_adapter(expected, *folders)
        ids = torch.arange(20, 40)[None]
        with torch.no_grad():
            torch.testing.assert_close(
                engines[-1](ids).logits, expected(ids).logits, rtol=1e-4, atol=1e-5
            )


GOOD = {"conversations": [{"role": "user", "content": "a"}], "gt": ["1"]}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"gt": None}, 'no "gt" with a list of strings'),
        ({"gt": [{"name": "f"}]}, 'no "gt" with a list of strings'),
        ({"conversations": []}, "at least one message"),
        *(
            ({"calls": calls}, '"calls" is no list of calls')
            for calls in (
                [{"name": "f"}],
                [{"arguments": {}}],
                [{"name": "f", "arguments": "{}"}],
                ["f"],
                {"name": "f", "arguments": {}},
                1,
            )
        ),
        (
            {
                "conversations": [
                    {"role": "system", "content": "", "tools": [{"name": "fly"}]},
                    *GOOD["conversations"],
                ]
            },
            "nobody can run fly. Give --tools FILE",
        ),
    ],
)
def test_a_faulty_row_is_named(changes, message, folder, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + json.dumps({**GOOD, **changes}) + "\n")
    with pytest.raises(ValueError, match=f"rows.jsonl:2: .*{message}"):
        eval_toolcall.main(["--weight", str(folder), "--data_path", str(path)])


# --- one question ---


def test_one_question_with_own_tools(folder, says, tmp_path, capsys):
    says(
        lambda prompt: (
            "It is 372."
            if "<tool_response>" in prompt
            else "Let me see.\n" + block("multiply", {"a": 12, "b": 31})
        )
    )
    eval_toolcall.main(
        ["--weight", str(folder), "--tools", str(write_tools(tmp_path)), "--prompt", "12 times 31?"]
    )
    assert capsys.readouterr().out.splitlines() == [
        "  user: 12 times 31?",
        '  assistant calls: multiply({"a": 12, "b": 31})',
        "  assistant: Let me see.",
        '  tool: {"result": 372}',
        "  assistant: It is 372.",
    ]


def test_a_real_network_answers_something(folder, tmp_path, capsys):
    flags = ("--temperature", "0.9", "--top_p", "0.9", "--show_speed", "1")
    assert run(folder, tmp_path, "--max_new_tokens", "4", limit=2)["overall"]["n"] == 2
    assert "tokens/s" not in capsys.readouterr().out
    assert run(folder, tmp_path, "--max_new_tokens", "4", *flags, limit=2)["overall"]["n"] == 2
    assert "tokens/s (" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--tools", "x.py"], "--tools FILE needs questions"),
        (["--prompt", "a", "--limit", "3"], "--limit has no effect with --prompt"),
        (["--prompt", "a", "--without_tools"], "--without_tools has no effect with --prompt"),
        (["--data_path", "a", "--toy_level", "full"], "--toy_level has no effect with --data_path"),
        (["--limit", "0"], "--limit 0"),
        (["--max_rounds", "-1"], "--max_rounds -1"),
    ],
)
def test_flags_that_contradict_each_other(flags, message, capsys):
    with pytest.raises(SystemExit):
        eval_toolcall.main(flags)
    assert message in capsys.readouterr().err


def test_a_pretrained_model_is_refused(folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = None
    bare = tmp_path / "bare_16x1"
    MiniMindForCausalLM.from_pretrained(folder).save_pretrained(bare)
    tokenizer.save_pretrained(bare)
    with pytest.raises(ValueError, match="only pretrained and cannot chat"):
        eval_toolcall.main(["--weight", str(bare)])


def test_calls_compare_as_bags():
    one, other = ("f", {"a": 1}), ("f", {"a": 2})
    assert same_calls([one, other], [other, one]) and same_calls([], [])
    assert not same_calls([one, one], [one, other]) and not same_calls([one, one], [one])


def test_values_in_a_text():
    for value, text, found in (
        ("5", "It is 5.", True),
        ("5", "It is 15.", False),
        ("5.0", "５", True),
        ("15", "一共十五个", True),
        ("05:40", "At 05:40.", True),
        ("Rome", "in rome", True),
        ("Rome", "Romeo", False),
        ("0.30000000000000004", "It is 0.3.", True),
        ("62.1371", "62.1372", False),
        ("62.1371", "62.137", False),
        ("3", "3.0000001", False),
    ):
        assert contains(text, value) == found, (value, text)

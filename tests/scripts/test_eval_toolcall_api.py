"""The measure of tool use over OpenAI's API: the same questions and table, of any server."""

import json
import sys

import pytest

from dataset.toy.tools import run_tool
from dataset.toy.world import make_world
from scripts import eval_toolcall
from tests.helpers.fake_api import FakeApi
from tests.helpers.tutorial_rows import write_agent_rl

ITEMS = list(make_world("mini").items("sft", "tools", "heldout", 24))
TURNS = {item.turns[0].question: item.turns[0] for item in ITEMS}


def perfect(body):
    """The right calls, then the right answer; nothing without tools."""
    question = next(m["content"] for m in body["messages"] if m["role"] == "user")
    turn = TURNS[question]
    if "tools" not in body:
        return {"content": "I cannot know."}
    if body["messages"][-1]["role"] == "tool":
        return {"reasoning": "Here it is.", "content": turn.reply}
    return {"calls": [(call.name, call.arguments) for call in turn.calls]}


def run(url, tmp_path, *flags, limit=24):
    path = tmp_path / "metrics.json"
    common = ["--backend", "api", "--api_base_url", url, "--json", path, "--limit", limit]
    eval_toolcall.main([*map(str, common), *map(str, flags)])
    return json.loads(path.read_text())


@pytest.mark.parametrize("stream", ["0", "1"])
def test_a_server_that_calls_rightly(stream, tmp_path, capsys):
    flags = ("--stream", stream, "--without_tools", "--show_speed", "1", "--api_key", "secret")
    with FakeApi(perfect) as server:
        found = run(server.url, tmp_path, *flags)
    row = {one["tool"]: one for one in found["rows"]}["overall"]
    assert found["model"] == "scripted" and found["api_base_url"] == server.url
    assert (row["n"], row["success"], row["exact"], row["no_call"]) == (24, 1, 1, 0)
    assert (row["calls"], row["invalid"], row["without_tools"]) == (24, 0, 0)
    assert "tokens/s (720 tokens in " in capsys.readouterr().out  # 10 of each completion
    assert len(server.requests) == 3 * 24
    streams = [body.get("stream_options") for body in server.requests]
    assert set(map(bool, streams)) == {stream == "1"}
    for body in server.requests:
        assert body["key"] == "Bearer secret" and body["model"] == "scripted"
        assert (body["temperature"], body["max_tokens"]) == (0, 256) and "top_p" not in body
        assert body.get("stream", False) == (stream == "1")
    answered = next(body for body in server.requests if body["messages"][-1]["role"] == "tool")
    called, result = answered["messages"][-2:]
    call = called["tool_calls"][0]
    assert result["tool_call_id"] == call["id"] and answered["tools"][0]["type"] == "function"
    name, arguments = call["function"]["name"], json.loads(call["function"]["arguments"])
    assert result["content"] == run_tool(name, arguments)


def test_faults_are_counted_for_what_they_are(tmp_path):
    """Arguments that are no JSON, a tool that is not there, and a call written into the text."""

    def faulty(body):
        question = next(m["content"] for m in body["messages"] if m["role"] == "user")
        kind, turn = [*TURNS].index(question) % 4, TURNS[question]
        if kind == 3 or body["messages"][-1]["role"] == "tool":
            return perfect(body)
        if kind == 2:  # a server that does not read its model's calls
            calls = [{"name": call.name, "arguments": call.arguments} for call in turn.calls]
            texts = [json.dumps(call, ensure_ascii=False) for call in calls]
            return {"content": "".join(f"<tool_call>\n{text}\n</tool_call>" for text in texts)}
        return {"calls": [("nothing", {}) if kind else (turn.calls[0].name, '{"x": ')]}

    with FakeApi(faulty) as server:
        row = run(server.url, tmp_path)["rows"][-1]
    assert (row["success"], row["exact"], row["no_call"]) == (0.5, 0.5, 0)
    assert (row["calls"], row["invalid"]) == (24, 0.5)


def test_sampling_and_thinking_are_asked_for(tmp_path):
    flags = ("--temperature", "0.9", "--top_p", "0.9", "--open_thinking", "1")
    flags += ("--api_model", "other", "--max_new_tokens", "99")
    with FakeApi(perfect) as server:
        run(server.url, tmp_path, *flags, limit=1)
    body = server.requests[0]
    assert (body["temperature"], body["top_p"], body["max_tokens"]) == (0.9, 0.9, 99)
    assert body["model"] == "other" and body["chat_template_kwargs"] == {"enable_thinking": True}


@pytest.mark.parametrize("stream", ["0", "1"])
def test_one_question_is_printed(stream, capsys):
    def reply(body):
        if body["messages"][-1]["role"] == "tool":
            return {"reasoning": "good", "content": "It is 42."}
        return {"calls": [("calculator", {"expression": "6 * 7"})]}

    flags = ["--backend", "api", "--prompt", "6 times 7?", "--stream", stream]
    with FakeApi(reply) as server:
        eval_toolcall.main([*flags, "--api_base_url", server.url])
    out = capsys.readouterr().out
    assert "42." in out and 'calculator({"expression": "6 * 7"})' in out and "good" in out
    assert out.count("It is 42.") == 1


def test_rows_of_the_tutorials_and_the_everyday_tools(tmp_path, capsys):
    """Numbers in "gt", a placeholder at the end, no list of calls: nothing can be exact."""
    answers = {"乘": "56", "miles": "6.2137", "东京": "12°C, 7.21", "早上好": "Good morning"}

    def reply(body):
        assert body["messages"][-1]["role"] in ("user", "tool")
        name = next(x for x in answers if x in body["messages"][1]["content"])
        if name == "miles" and body["messages"][-1]["role"] == "user":
            arguments = {"value": 10, "from_unit": "km", "to_unit": "miles"}
            return {"calls": [("unit_converter", arguments)]}
        return {"content": answers[name]}

    path = write_agent_rl(tmp_path / "agent_rl.jsonl", 4)
    with FakeApi(reply) as server:
        (row, overall) = run(server.url, tmp_path, "--data_path", path)["rows"]
    out = capsys.readouterr().out
    assert "tools of dataset/chat/everyday_tools.py, because rows offer them: calculate" in out
    assert overall["success"] == 1 and overall["exact"] is None and overall["no_call"] == 0.75
    assert overall["invalid"] == 0 and row["tool"] == "any" and " - " in out


def test_our_own_server(server, tmp_path):
    """A network that writes nonsense, but every request is understood; tools that are on offer."""
    row = run(f"{server.url}/v1", tmp_path, "--max_new_tokens", "8", limit=3)["rows"][-1]
    assert row["n"] == 3 and row["success"] == 0
    with pytest.raises(ValueError, match="there is no model 'x'"):
        run(f"{server.url}/v1", tmp_path, "--api_model", "x", limit=1)
    with pytest.raises(OSError, match=r"no server answers at http://.*:9/v1: start one"):
        run("http://127.0.0.1:9/v1", tmp_path, limit=1)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--stream", "0"], "--stream has no effect with --backend local"),
        (["--api_model", "x"], "--api_model has no effect with --backend local"),
        (["--backend", "api", "--weight", "x"], "--weight has no effect with --backend api"),
        (["--backend", "api", "--device", "cpu"], "--device has no effect with --backend api"),
        (["--top_p", "0.9"], "--top_p has no effect with --temperature 0"),
        (["--temperature", "1", "--top_p", "0"], "--top_p 0.0: give"),
        (["--temperature", "-1"], "--temperature -1.0"),
    ],
)
def test_flags_that_contradict_each_other(flags, message, capsys):
    with pytest.raises(SystemExit):
        eval_toolcall.main(flags)
    assert message in capsys.readouterr().err


def test_without_the_package_the_flag_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(SystemExit):
        eval_toolcall.main(["--backend", "api"])
    assert "--backend api needs a package that is not installed" in capsys.readouterr().err

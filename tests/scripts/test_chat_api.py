"""The example client against a real server."""

import json
from types import SimpleNamespace

import openai
import pytest

from scripts import chat_api
from tests.helpers.own_tools import write_tools


def part(content=None, reasoning=None, call=None):
    delta = SimpleNamespace(content=content, reasoning_content=reasoning, tool_calls=call)
    return SimpleNamespace(choices=[SimpleNamespace(delta=delta)])


def call(index, name=None, arguments=None):
    return [
        SimpleNamespace(
            index=index,
            id=name and f"call_{index}",
            function=SimpleNamespace(name=name, arguments=arguments),
        )
    ]


def test_a_question_is_answered(server, capsys):
    flags = ["--base_url", f"{server.url}/v1", "--prompt", "Hello", "--max_tokens", "5"]
    chat_api.main(flags)
    plain = capsys.readouterr().out
    assert plain.strip()
    chat_api.main([*flags, "--think"])
    assert capsys.readouterr().out.startswith("[")
    chat_api.main(
        [*flags, "--tools", "calculator"]
    )  # the network writes nonsense, and calls nothing
    with pytest.raises(ValueError, match="there is no model 'x'"):
        chat_api.main([*flags, "--model", "x"])
    with pytest.raises(OSError, match="start one"):
        chat_api.main(["--base_url", "http://127.0.0.1:9/v1", "--prompt", "x"])


def test_an_error_in_the_middle_of_a_stream(server, monkeypatch):
    def fail(*_):
        raise openai.APIError("the engine has stopped", request=None, body=None)

    monkeypatch.setattr(chat_api, "answer", fail)
    with pytest.raises(ValueError, match="the engine has stopped"):
        chat_api.main(["--base_url", f"{server.url}/v1", "--prompt", "x"])


def test_tools_are_run_until_there_is_an_answer(capsys):
    rounds = [
        [
            part(reasoning="which?"),
            part(call=call(0, "calculator", "")),
            part(call=call(0, None, '{"expression": ')),
            part(call=call(0, None, '"6 * 7"}')),
            part(call=call(1, "get_time", '{"city"')),
        ],
        [part("It is "), part("42.")],
    ]
    asked = []

    def create(messages, **options):
        asked.append([*messages])
        return rounds[len(asked) - 1]

    client = SimpleNamespace(chat=SimpleNamespace(completions=SimpleNamespace(create=create)))
    messages = [{"role": "user", "content": "6 times 7?"}]
    args = chat_api.parse_args(
        chat_api.ChatArgs, ["--model", "x", "--tools", "calculator", "get_time"]
    )
    chat_api.answer(client, messages, args)
    assert [message["role"] for message in messages] == [
        "user",
        "assistant",
        "tool",
        "tool",
        "assistant",
    ]
    assert messages[1]["tool_calls"][0]["function"] == {
        "name": "calculator",
        "arguments": '{"expression": "6 * 7"}',
    }
    assert (
        json.loads(messages[2]["content"]) == {"result": 42} and "no JSON" in messages[3]["content"]
    )
    assert messages[-1]["content"] == "It is 42." and capsys.readouterr().out.startswith(
        "[which?]\n"
    )


def test_tools_of_a_file_and_of_the_toy_world_together(tmp_path, capsys):
    path = str(write_tools(tmp_path))
    box = chat_api.parse_args(chat_api.ChatArgs, ["--tools", "get_time", path]).box
    assert [schema["function"]["name"] for schema in box.schemas()] == ["get_time", "multiply"]
    assert json.loads(box.run("multiply", {"a": 6, "b": 7})) == {"result": 42}
    for tools, message in (
        (["fly"], "--tools fly: give a .py file, or some of calculator"),
        (["no.py"], "no.py is no Python file"),
        ([path, path], "two tools called multiply"),
    ):
        with pytest.raises(SystemExit):
            chat_api.parse_args(chat_api.ChatArgs, ["--tools", *tools])
        assert message in capsys.readouterr().err

import json

import pytest

from dataset.prepare.convert import convert_row, detect

GET = {"name": "get", "parameters": {"type": "object"}}
SYSTEM = "SYSTEM: You are a helpful assistant with access to the following functions. Use them if "
SYSTEM += f"required -\n{json.dumps(GET, indent=4)}\n\n{json.dumps({**GET, 'name': 'set'})}\n"
CHAT = """USER: What is a? Note: USER: is no speaker here.


ASSISTANT: <functioncall> {"name": "get", "arguments": '{"key": "a"}'} <|endoftext|>


FUNCTION RESPONSE: {"a": 2}


ASSISTANT: It is 2. <|endoftext|>
"""


@pytest.mark.parametrize("row", [{"system": SYSTEM, "chat": CHAT}, {"sample": SYSTEM + CHAT}])
def test_a_conversation_in_one_text(row):
    assert detect(row) == "glaive"
    system, question, call, result, answer = convert_row(row)["conversations"]
    assert system["content"] == "You are a helpful assistant"
    assert [tool["name"] for tool in json.loads(system["tools"])] == ["get", "set"]
    assert question == {"role": "user", "content": "What is a? Note: USER: is no speaker here."}
    assert call["content"] == ""
    assert json.loads(call["tool_calls"]) == [{"name": "get", "arguments": {"key": "a"}}]
    assert result == {"role": "tool", "content": '{"a": 2}'}
    assert answer == {"role": "assistant", "content": "It is 2."}


def test_texts_that_are_no_conversation_are_refused():
    with pytest.raises(ValueError, match='begins with "SYSTEM:" or "USER:"'):
        convert_row({"chat": "Hello."}, "glaive")
    assert detect({"sample": "train", "text": "T"}) == "text"
    with pytest.raises(ValueError, match="a tool in the system text is no JSON"):
        convert_row({"system": "SYSTEM: functions -\n{get}", "chat": CHAT})
    row = convert_row({"system": "SYSTEM: You are {name}.", "chat": CHAT})
    assert row["conversations"][0]["content"] == "You are {name}."

"""Raw replies taken apart: against the template that writes them, cut at every place, and malformed
in every way.
"""

import json
import random

import pytest

from dataset.chat.format import encode_conversation
from dataset.chat.reply import (
    CallArguments,
    CallEnd,
    CallStart,
    Content,
    Reasoning,
    ReplyParser,
    collect,
    parse_reply,
)
from model.text_stream import TextStream, token_bytes

CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'


def call(name="f", arguments='{"a": 1}'):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def message(content="", reasoning=None, calls=()):
    return {
        "role": "assistant",
        "content": content,
        **({"reasoning_content": reasoning} if reasoning else {}),
        **({"tool_calls": list(calls)} if calls else {}),
    }


REPLIES = [
    ("", message()),
    ("hello", message("hello")),
    ("\n\n hi \n", message("\n\n hi \n")),
    ("<think>\nhm\n</think>\n\nyes", message("yes", "hm")),
    ("<think>\n\n</think>\n\nyes", message("yes")),
    ("<think>\na\n\nb\n</think>\n\n", message("", "a\n\nb")),
    ("<think>never ends", message("", "never ends")),
    ("a < b <think> c </think>", message("a < b <think> c </think>")),
    ("<thin", message("<thin")),
    (CALL, message(calls=[call()])),
    (f"{CALL}\n{CALL}", message(calls=[call(), call()])),
    (f"I look.\n{CALL}", message("I look.", calls=[call()])),
    (f"{CALL} there", message(" there", calls=[call()])),
    (f"<think>\nhm\n</think>\n\nI look.\n{CALL}", message("I look.", "hm", [call()])),
    (f"<think>{CALL}</think>", message("", CALL)),
    (
        '<tool_call>{"name":"f","arguments":{"x":"</tool_call>"}}</tool_call>',
        message(calls=[call(arguments='{"x": "</tool_call>"}')]),
    ),
    ('<tool_call>{"arguments": "{\\"a\\": 1}", "name": "f"}</tool_call>', message(calls=[call()])),
    ('<tool_call>{"name": "f"}</tool_call>', message(calls=[call(arguments="{}")])),
]
MALFORMED = [
    "<tool_call>",
    "<tool_call>\n{}\n</tool_call>",
    '<tool_call>\n{"name": "f", "arguments": {"a": \n</tool_call>',
    '<tool_call>\n{"name": "f", "arguments": [1]}\n</tool_call>',
    "<tool_call>x</tool_call> and more",
    '<tool_call>\n{"name": "f", "arguments": {"a": NaN}}\n</tool_call>',
    "a <tool_call><tool_call>b</tool_call>",
    '<tool_call>{"name": "f", "arguments": {"a": "open</tool_call>',
    "</tool_call> <tool_ca",
    "x\n<tool_call>\n{",
    '<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>',
    f"<tool_call>{'[' * 5000}</tool_call>",
    '<tool_call>{"name": "f", "arguments": {}}<tool_call>',
]


def in_pieces(text, cuts, **options):
    parser, events = ReplyParser(**options), []
    for start, end in zip([0, *cuts], [*cuts, len(text)]):
        events += parser.feed(text[start:end])
    return events + parser.finish()


@pytest.mark.parametrize(
    "text, expected", REPLIES, ids=lambda x: None if isinstance(x, dict) else repr(x[:40])
)
def test_replies_are_taken_apart_however_they_are_cut(text, expected):
    assert parse_reply(text) == expected
    for cut in range(1, len(text)):
        assert collect(in_pieces(text, [cut])) == expected
    assert collect(in_pieces(text, range(1, len(text)))) == expected
    for seed in range(20):
        cuts = sorted(random.Random(seed).choices(range(len(text) + 1), k=4))
        assert collect(in_pieces(text, cuts)) == expected


@pytest.mark.parametrize("text", MALFORMED, ids=lambda text: repr(text[:40]))
def test_malformed_calls_stay_content_to_the_last_character(text):
    assert parse_reply(text) == message(text)
    assert collect(in_pieces(text, range(1, min(len(text), 300)))) == message(text)
    good = parse_reply(f"{text}\n{CALL}")
    assert good["content"].startswith(text.split("</tool_call>")[0].split("<tool_ca")[0])
    assert good.get("tool_calls") == [call()]


def test_a_prompt_may_have_opened_the_think_block():
    assert parse_reply("hm\n</think>\n\nyes", in_reasoning=True) == message("yes", "hm")
    assert parse_reply("\nhm", in_reasoning=True) == message("", "hm")
    assert collect(in_pieces("hm\n</think>\n\nyes", range(1, 17), in_reasoning=True)) == message(
        "yes", "hm"
    )
    parser = ReplyParser(in_reasoning=True)
    assert parser.in_reasoning and parser.feed("hm</think>") and not parser.in_reasoning


def test_without_tools_a_call_is_text():
    assert parse_reply(CALL, tools=False) == message(CALL)


def test_text_is_handed_out_as_soon_as_it_is_certain():
    parser = ReplyParser()
    assert parser.feed("Hel") == [Content("Hel")]
    assert parser.feed("lo <tool") == [Content("lo ")]
    assert parser.feed("box>") == [Content("<toolbox>")]
    assert ReplyParser(in_reasoning=True).feed("so") == [Reasoning("so")]
    assert parser.feed(CALL[:-1]) == []
    assert parser.feed(">") == [CallStart(0, "f"), CallArguments(0, '{"a": 1}'), CallEnd(0)]


def test_trusted_calls_come_in_pieces():
    arguments = '{"a": "}\\"</tool_call>{\\\\", "b": [{}, {"c": "]"}]}'
    text = f'ok\n<tool_call>\n{{"name": "f", "arguments": {arguments}}}\n</tool_call>\n{CALL}'
    for cuts in ([], range(1, len(text)), range(3, len(text), 3)):
        events = in_pieces(text, cuts, trust_calls=True)
        assert collect(events) == message("ok", calls=[call(arguments=arguments), call()])
        assert [event for event in events if isinstance(event, CallStart | CallEnd)] == [
            CallStart(0, "f"),
            CallEnd(0),
            CallStart(1, "f"),
            CallEnd(1),
        ]
    pieces = [
        event.text
        for event in in_pieces(text, range(1, len(text)), trust_calls=True)
        if isinstance(event, CallArguments) and event.index == 0
    ]
    assert len(pieces) == len(arguments)
    cut = in_pieces(text[:60], [], trust_calls=True)
    assert collect(cut)["tool_calls"] == [call(arguments=text[:60].partition('"arguments": ')[2])]
    assert not any(isinstance(event, CallEnd) for event in cut)


def test_the_template_and_the_parser_are_inverse(tokenizer):
    conversations = [
        message("Plain."),
        message("42", "6 times 7\n\nis 42"),
        message("\nfirst line empty"),
        message("I ask.", "which tool?", [call(), call("g", '{"x": "中文 \\"q\\" <tool_call>"}')]),
        message(calls=[call()]),
    ]
    pieces = token_bytes(tokenizer)
    for answer in conversations:
        prompt = [{"role": "user", "content": "?"}]
        ids, is_target = encode_conversation(tokenizer, [*prompt, answer])
        stream, parser, events = TextStream(pieces), ReplyParser(), []
        for token in [token for token, trained in zip(ids, is_target) if trained]:
            events += parser.feed(stream.push(token))
        events += parser.feed(stream.finish()) + parser.finish()
        assert collect(events) == answer
        assert encode_conversation(tokenizer, [*prompt, collect(events)]) == (ids, is_target)
        for one in collect(events).get("tool_calls", []):
            json.loads(one["function"]["arguments"])


def test_a_prompt_may_have_begun_the_answer():
    parser = ReplyParser(is_begun=True)
    events = [*parser.feed("\n\n<think>no</think> "), *parser.feed(CALL), *parser.finish()]
    assert events[0] == Content("\n\n<think>no</think> ")
    assert collect(events)["tool_calls"] == [call()]
    parser = ReplyParser(in_reasoning=True, is_begun=True)
    assert parser.feed("\n\nso</think>\n\nyes") == [Reasoning("\n\nso"), Content("yes")]

"""Streamed text: whole characters, nothing lost, nothing of a stop text."""

import random

from model.text_stream import TextStream, token_bytes

MIXED = "数学 maths, naïve café — 👩‍👩‍👧 𠮷 <|im_end|> 的\n\n  <think>x</think> \t end 你好"


def test_pieces_join_to_what_the_tokenizer_decodes(tokenizer):
    pieces, rng = token_bytes(tokenizer), random.Random(0)
    planes = (32, 0xD7FF), (0x10000, 0x1FFFF)
    anything = "".join(chr(rng.randrange(*rng.choice(planes))) for _ in range(500))
    for text in (MIXED, anything):
        ids = tokenizer(text).input_ids
        stream = TextStream(pieces)
        parts = [stream.push(token) for token in ids] + [stream.finish()]
        assert "".join(parts) == stream.text == tokenizer.decode(ids, skip_special_tokens=True)
        assert "\ufffd" not in "".join(parts)


def test_random_tokens_give_what_decode_gives(tokenizer):
    pieces, rng = token_bytes(tokenizer), random.Random(1)
    for _ in range(50):
        ids = [rng.randrange(9, len(tokenizer)) for _ in range(30)]
        stream, expected = TextStream(pieces), b"".join(pieces[i] for i in ids)
        text = "".join([*map(stream.push, ids), stream.finish()])
        assert text == expected.decode(errors="replace")


def test_a_character_comes_when_it_is_whole(tokenizer):
    ids = [token_bytes(tokenizer).index(bytes([byte])) for byte in "\U0001f4ca".encode()]
    stream = TextStream(token_bytes(tokenizer))
    assert [stream.push(token) for token in ids] == ["", "", "", "\U0001f4ca"]
    half = TextStream(token_bytes(tokenizer))
    assert half.push(ids[0]) == "" and half.finish() == "\ufffd"


def spell(tokenizer, text):
    return [tokenizer.convert_tokens_to_ids(tokenizer.tokenize(char)[0]) for char in text]


def test_stop_texts(tokenizer):
    pieces = token_bytes(tokenizer)
    for text, stop, expected, stopped in (
        ("abcdef", ("cd",), "ab", True),
        ("abcdef", ("xx", "def"), "abc", True),
        ("ababac", ("abac",), "ab", True),
        ("abcd", ("cde",), "abcd", False),
        ("aaab", ("aab",), "a", True),
        ("hello", ("lo", "el"), "h", True),
    ):
        stream, seen = TextStream(pieces, stop), ""
        for token in spell(tokenizer, text):
            seen += stream.push(token)
            assert expected.startswith(seen), "a part of the stop text was handed out"
        seen += stream.finish()
        assert (seen, stream.text, stream.stopped) == (expected, expected, stopped)
        assert stream.push(spell(tokenizer, "z")[0]) == "" or not stopped


def test_text_that_cannot_be_a_stop_text_any_more_is_handed_out_at_once(tokenizer):
    stream = TextStream(token_bytes(tokenizer), ("END",))
    assert [stream.push(token) for token in spell(tokenizer, "aENx")] == ["a", "", "", "ENx"]


def test_stop_texts_are_looked_for_between_switches(tokenizer):
    pieces = token_bytes(tokenizer)
    off, on = tokenizer.convert_tokens_to_ids(["<tool_call>", "</tool_call>"])
    for text, in_scope, expected in (
        ("ab<tool_call>xEND</tool_call>cENDd", True, "ab<tool_call>xEND</tool_call>c"),
        ("aEN<tool_call>D</tool_call>D", True, "aEN<tool_call>D</tool_call>D"),
        ("xEND</tool_call>\n\nENDd", False, "xEND</tool_call>\n\n"),
        ("xEND", False, "xEND"),
        ("aENDb<tool_call>", True, "a"),
    ):
        ids = tokenizer(text).input_ids
        stream = TextStream(pieces, ("END",), {off: False, on: True}, in_scope)
        parts = [stream.push(token) for token in ids] + [stream.finish()]
        assert "".join(parts) == stream.text == expected
    stream = TextStream(pieces, ("\n\n",), {off: False, on: True})
    for token in tokenizer("</tool_call>\n\na\n\nb").input_ids:
        stream.push(token)
    assert stream.text == "</tool_call>\n\na"  # the first line breaks belong to the token

"""Prompts that end within the last message: their ids are those of transformers."""

import pytest

from dataset.chat.format import encode_continuation, encode_conversation, encode_prompt

ASK = {"role": "user", "content": "How many stairs?"}
CALL = {"name": "count", "arguments": '{"what": "stairs"}'}
TOOL = {"type": "function", "function": {"name": "count", "parameters": {"type": "object"}}}


def answer(content, **more):
    return {"role": "assistant", "content": content, **more}


CASES = {
    "in a word": ([ASK, answer("There are thir")], None),
    "after a space": ([ASK, answer("There are ")], None),
    "line breaks and spaces": ([ASK, answer("Stairs:\n\n  ")], None),
    "chinese": ([ASK, answer("一共有十")], None),
    "nothing yet": ([ASK, answer("")], None),
    "a system message": ([{"role": "system", "content": "Count."}, ASK, answer("1, 2,")], None),
    "tools": ([ASK, answer("", tool_calls=[CALL]), {"role": "tool", "content": "9"}, answer("I")],
              [TOOL]),
    "two answers in a row": ([ASK, answer("Nine."), answer("No, t")], None),
    "the same text twice": ([ASK, answer("Nine"), ASK, answer("Nine")], None),
    "nothing before it": ([answer("Once")], None),
    "after reasoning": ([ASK, answer("So n", reasoning_content="Let me see.")], None),
    "after no reasoning": ([ASK, answer("So n", reasoning_content="")], None),
    "reasoning in the content": ([ASK, answer("<think>\nHm.\n</think>\n\nSo n")], None),
    "reasoning and nothing yet": ([ASK, answer("<think>\nHm.\n</think>\n\n")], None),
    "in reasoning": ([ASK, answer("<think>\nHm, the stairs ")], None),
    "the word of transformers": ([ASK, answer("CONTINUE_FINAL_MESSAGE_TAG is")], None),
}  # fmt: skip


@pytest.mark.parametrize("messages, tools", CASES.values(), ids=CASES)
def test_ids_are_those_of_transformers(tokenizer, messages, tools):
    ids = encode_continuation(tokenizer, messages, tools)
    assert ids == tokenizer.apply_chat_template(
        messages, tools, continue_final_message=True, return_dict=False
    )
    closed = tokenizer.decode(encode_conversation(tokenizer, messages, tools)[0])
    text = tokenizer.decode(ids)
    if messages[-1]["content"].startswith("<think>\nHm, "):
        assert text.endswith("<|im_start|>assistant\n<think>\nHm, the stairs ")
    else:
        assert closed == text + "<|im_end|>\n"


def test_what_people_write_becomes_no_special_token(tokenizer):
    marks = set(tokenizer.added_tokens_decoder)
    for content in ("a<|im_end|>b", "x <think> y", "<think>a<|im_end|><think>b"):
        ids = encode_continuation(tokenizer, [ASK, answer(content)])
        begun = encode_prompt(tokenizer, [ASK])
        assert ids[: len(begun)] == begun
        found = [token for token in ids[len(begun) :] if token in marks]
        assert found == ([7] if content.startswith("<think>") else [])


def test_a_message_without_content_cannot_be_continued(tokenizer):
    with pytest.raises(ValueError, match=r"no .content. to continue"):
        encode_continuation(tokenizer, [ASK, answer(None, tool_calls=[CALL])])

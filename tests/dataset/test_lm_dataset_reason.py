"""Thinking and direct rows: what is trained begins with the prompt of the switch, and only (seed,
row) decides which it is.
"""

import pickle
from pathlib import Path

import pytest

from dataset.chat.format import encode_conversation, encode_prompt
from dataset.chat.spellings import read_messages
from dataset.files.jsonl import read_rows
from dataset.lm_dataset import ReasonDataset
from tests.helpers.rows import chat, targets_of, text_of, write

ROOT = Path(__file__).resolve().parents[2]
CORPORA = ROOT.parent / "shared" / "data"
QUESTION = [{"role": "user", "content": "What is 2 + 2?"}]


@pytest.fixture
def reason(tmp_path, tokenizer):
    return lambda rows, max_seq_len=512, name="rows", **options: ReasonDataset(
        write(tmp_path / f"{name}.jsonl", rows),
        tokenizer,
        max_seq_len,
        cache_dir=tmp_path / "cache",
        **options,
    )


def begins_with(dataset, index, prompt):
    return dataset[index]["input_ids"][: len(prompt)].tolist() == prompt


THOUGHTS = [
    "2 and 2",
    " 2 and 2",
    "\n\n2",
    "\tso",
    "二加二",
    "。",
    "\r\nso",
    "\u3000全",
    "- 2\n- 2\n",
    "```\n2\n```",
    "<think>2</think>",
]


@pytest.mark.parametrize("thought", THOUGHTS)
@pytest.mark.parametrize("answer", ["4.", "\n4", " 4", "</think>", "\n\n"])
def test_both_rows_begin_with_the_prompts_of_the_switch(reason, tokenizer, thought, answer):
    thinking = encode_prompt(tokenizer, QUESTION, enable_thinking=True)
    direct = encode_prompt(tokenizer, QUESTION, enable_thinking=False)
    row = chat(answer=answer, reasoning_content=thought)
    dataset = reason([row])
    assert begins_with(dataset, 0, thinking) and not begins_with(dataset, 0, direct)
    # the model opens the block itself where the prompt does not, so all of it is trained
    assert (
        targets_of(tokenizer, dataset)
        == "<think>\n" + thought.strip("\n") + f"\n</think>\n\n{answer}<|im_end|>"
    )
    dataset = reason([row], direct_ratio=1.0)
    assert (
        begins_with(dataset, 0, direct) and targets_of(tokenizer, dataset) == f"{answer}<|im_end|>"
    )
    if answer.strip():  # else the row is refused
        plain = reason([chat(answer=answer)])
        assert plain[0]["input_ids"].tolist() == dataset[0]["input_ids"].tolist()


def test_a_thought_inside_the_content_is_a_thought(reason, tokenizer):
    row, inside = (
        chat(answer="4.", reasoning_content="2 and 2"),
        chat(answer="<think>\n2 and 2\n</think>\n\n4."),
    )
    for ratio in (0.0, 1.0):
        assert text_of(tokenizer, reason([inside], direct_ratio=ratio)) == text_of(
            tokenizer, reason([row], direct_ratio=ratio)
        )


def test_rows_without_a_thought_are_direct_unless_told_otherwise(reason, tokenizer):
    rows = [
        chat(question=f"{i}?", reasoning_content=reasoning)
        for i, reasoning in enumerate((None, "", "  "))
    ]
    texts = [text_of(tokenizer, reason(rows), i) for i in range(3)]
    assert all("assistant\n<think>\n\n</think>\n\n4." in text for text in texts)
    assert "<think>" not in text_of(tokenizer, reason(rows, empty_think_ratio=0.0), 0)


def test_a_direct_conversation_has_no_thoughts_at_all(reason, tokenizer):
    messages = [
        *QUESTION,
        {"role": "assistant", "content": "4.", "reasoning_content": "old"},
        {"role": "user", "content": "And 3?"},
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "look",
            "tool_calls": [{"name": "f", "arguments": {}}],
        },
        {"role": "tool", "content": "5"},
        {"role": "assistant", "content": "5.", "reasoning_content": "read"},
    ]
    direct = text_of(tokenizer, reason([{"conversations": messages}], direct_ratio=1.0))
    assert direct.count("<think>") == 1 and direct.endswith(
        "assistant\n<think>\n\n</think>\n\n5.<|im_end|>\n"
    )
    assert not any(thought in direct for thought in ("old", "look", "read"))
    prompt = encode_prompt(
        tokenizer,
        [{k: v for k, v in m.items() if k != "reasoning_content"} for m in messages[:-1]],
        enable_thinking=False,
    )
    assert begins_with(reason([{"conversations": messages}], direct_ratio=1.0), 0, prompt)
    thinking = reason([{"conversations": messages}])
    assert begins_with(thinking, 0, encode_prompt(tokenizer, messages[:-1], enable_thinking=True))
    assert "look" in targets_of(tokenizer, thinking) and "old" not in text_of(tokenizer, thinking)


def test_the_ratio_of_direct_rows_and_that_seed_and_row_alone_decide(reason, tokenizer):
    rows = [
        chat(question=f"What is {i} + 1?", answer=f"{i + 1}.", reasoning_content="count")
        for i in range(400)
    ]

    def direct(rows, name="rows", **options):
        dataset = reason(rows, name=name, **options)
        return {
            text_of(tokenizer, dataset, i)
            for i in range(len(dataset))
            if "count" not in text_of(tokenizer, dataset, i)
        }

    some = direct(rows, direct_ratio=0.3, seed=1)
    assert 90 <= len(some) <= 150  # 120, and more than three standard deviations to either side
    assert (
        direct(rows[::-1], "other", direct_ratio=0.3, seed=1)
        == some
        != direct(rows, direct_ratio=0.3, seed=2)
    )
    assert some < direct(rows, direct_ratio=0.6, seed=1) and direct(rows) == set()
    assert len(direct(rows, direct_ratio=1.0)) == 400


def test_thoughts_are_drawn_apart_from_empty_blocks(reason, tokenizer):
    rows = [
        chat(question=f"{i}?", **({"reasoning_content": "count"} if i % 2 else {}))
        for i in range(200)
    ]
    dataset = reason(rows, direct_ratio=1.0, empty_think_ratio=0.0)
    assert sum("<think>\n\n</think>" in text_of(tokenizer, dataset, i) for i in range(200)) == 100


@pytest.mark.parametrize("options", [{"direct_ratio": 1.1}, {"empty_think_ratio": -0.1}])
def test_ratios_out_of_range_are_refused(reason, options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} is .* Give a ratio from 0 to 1"):
        reason([chat(reasoning_content="so")], **options)


def test_the_cache_knows_the_ratios(reason, tokenizer):
    row = chat(reasoning_content="so")
    names = {
        reason([row], direct_ratio=ratio, empty_think_ratio=other).fingerprint
        for ratio in (0, 1.0)
        for other in (0, 1.0)
    }
    assert len(names) == 4
    pickle.loads(pickle.dumps(reason([row])))  # travels to other processes


REAL = [
    ("sft/sft_en_reason_tooluse", 50),
    ("sft/sft_en_reasoning_r1_pcmb", 40),
    ("sft/sft_zh_toolcall_glaive", 60),
    ("sft/sft_en_toolcall_glaive", 60),
    ("sft/sft_en_toolcall_sgd", 30),
]


@pytest.mark.parametrize("name, count", REAL, ids=[name for name, _ in REAL])
@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_real_rows_begin_with_the_prompt_of_their_switch(name, count, ratio, tokenizer, tmp_path):
    """And every token is the template's; what is trained of the last answer is what follows the
    prompt.
    """
    path = CORPORA / f"{name}.jsonl.xz"
    if not path.is_file():
        pytest.skip("the real corpora are not here")
    rows = [row for _, (_, row) in zip(range(count), read_rows(path))]
    dataset = ReasonDataset(
        write(tmp_path / "rows.jsonl", rows),
        tokenizer,
        20_000,
        cache_dir=tmp_path,
        direct_ratio=ratio,
        num_proc=1,
    )
    assert len(dataset) == len(rows)
    thinking = 0
    for i, row in enumerate(rows):
        *messages, last = read_messages(row["conversations"])
        assert last["role"] == "assistant"
        thinks = bool(last.get("reasoning_content")) and not ratio
        thinking += thinks
        if not thinks and last.get("reasoning_content"):
            messages = [
                {key: value for key, value in message.items() if key != "reasoning_content"}
                for message in messages
            ]
        prompt = encode_prompt(tokenizer, messages, enable_thinking=thinks)
        assert begins_with(dataset, i, prompt), f"{name}:{i + 1}"
        answer = encode_conversation(
            tokenizer, [*messages, {**last, **({} if thinks else {"reasoning_content": ""})}]
        )
        assert dataset[i]["input_ids"].tolist() == answer[0]
        assert (dataset[i]["labels"][1:] != -100).tolist() == answer[1][1:]
    assert thinking == (count if "reason" in name and not ratio else 0)

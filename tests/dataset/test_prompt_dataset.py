"""Prompts of reinforcement learning: what is read, left out and refused; steps that depend on
nothing but (seed, step).
"""

import json

import pytest

from dataset.chat.format import encode_prompt
from dataset.prompt_dataset import PromptDataset, PromptSteps


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def question(text, **more):
    return {"conversations": [{"role": "user", "content": text}], "answer": "1", **more}


def test_rows_and_prompts_and_what_is_too_long(tmp_path, tokenizer):
    path = write(
        tmp_path / "rows.jsonl",
        [question("What is 1 + 1?", skill="sums"), question("word " * 100), question("Why?")],
    )
    dataset = PromptDataset(path, tokenizer, 40)
    assert len(dataset) == 2 and dataset.rows[0]["skill"] == "sums"
    assert dataset.prompts == [
        encode_prompt(tokenizer, row["conversations"]) for row in dataset.rows
    ]
    assert (
        "3 read, 2 used, 0 skipped, 1 with a prompt above 40 tokens" in dataset.report
        and f"{path}:2" in dataset.report
    )
    thinking = PromptDataset(path, tokenizer, 40, enable_thinking=True)
    assert (
        tokenizer.decode(thinking.prompts[0]).endswith("<think>\n")
        and thinking.fingerprint != dataset.fingerprint
    )


def test_a_bare_question_is_a_conversation_of_one_message(tmp_path, tokenizer):
    bare = {"question": "What is 1 + 1?", "answer": "2", "source": "here"}
    dataset = PromptDataset(
        write(tmp_path / "rows.jsonl", [bare, question("Why?", question="not this")]), tokenizer, 40
    )
    assert dataset.rows[0] == {
        **bare,
        "conversations": [{"role": "user", "content": "What is 1 + 1?"}],
    }
    assert dataset.prompts[0] == encode_prompt(tokenizer, dataset.rows[0]["conversations"])
    assert dataset.rows[1]["conversations"][0]["content"] == "Why?"


def test_a_last_answer_is_left_out_and_counted(tmp_path, tokenizer):
    question = [{"role": "user", "content": "a"}]
    rows = [{"conversations": [*question, {"role": "assistant", "content": ""}], "gt": ["b"]}]
    dataset = PromptDataset(write(tmp_path / "rows.jsonl", rows), tokenizer, 64)
    assert dataset.rows[0]["conversations"] == question and dataset.rows[0]["gt"] == ["b"]
    assert dataset.prompts[0] == encode_prompt(tokenizer, question)
    assert "without their last answer, which the model writes: 1" in dataset.report


@pytest.mark.parametrize("content", ["", "无", None])
def test_numbers_and_placeholders_as_public_files_have_them(content, tmp_path, tokenizer):
    question = {"role": "user", "content": "a", "reasoning_content": None, "tool_calls": None}
    conversation = [question, {**question, "role": "assistant", "content": content}]
    rows = [{"conversations": conversation, "gt": [6.5, 7, "x", True]}]
    dataset = PromptDataset(write(tmp_path / "rows.jsonl", rows), tokenizer, 64)
    assert dataset.rows[0] == {"conversations": [question], "gt": ["6.5", "7", "x", True]}


@pytest.mark.parametrize(
    "row, message",
    [
        ({"text": "no"}, 'no "conversations"'),
        ({"conversations": [{"role": "assistant", "content": "b"}]}, "no question at the end"),
        ({"conversations": [{"role": "user", "content": "a"}], "tools": "[1]"}, '"tools" next to'),
        ({"conversations": [{"role": "nobody", "content": "a"}]}, "role 'nobody'"),
    ],
)
def test_a_faulty_row_is_named_or_skipped(row, message, tmp_path, tokenizer):
    path = write(tmp_path / "rows.jsonl", [question("Why?"), row])
    with pytest.raises(ValueError, match=f"rows.jsonl:2: .*{message}"):
        PromptDataset(path, tokenizer, 40)
    dataset = PromptDataset(path, tokenizer, 40, bad_rows="skip")
    assert len(dataset) == 1 and "1 skipped" in dataset.report
    with pytest.raises(ValueError, match="no prompt is left"):
        PromptDataset(write(tmp_path / "bad.jsonl", [row]), tokenizer, 40, bad_rows="skip")


def test_a_split_keeps_equal_prompts_together(tmp_path, tokenizer):
    rows = [question(f"What is {i % 20}?", n=i) for i in range(60)]
    dataset = PromptDataset(write(tmp_path / "rows.jsonl", rows), tokenizer, 40)
    training, held_out = dataset.held_out_split(0.25, seed=3)
    assert (
        len(training) + len(held_out) == 60 and len(held_out) == 15
    )  # 5 of the 20 prompts, three times each
    assert not {row["conversations"][0]["content"] for row in training.rows} & {
        row["conversations"][0]["content"] for row in held_out.rows
    }
    assert len(dataset.held_out_split(0.5, max_rows=2)[1]) == 6
    assert len({dataset.fingerprint, training.fingerprint, held_out.fingerprint}) == 3


def test_steps_go_through_every_prompt_once_an_epoch():
    steps = PromptSteps(10, 4, seed=1, epochs=2)
    assert len(steps) == 5
    flat = [i for step in range(5) for i in steps[step]]
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10)) and flat[:10] != flat[10:]
    assert (
        steps[3]
        == PromptSteps(10, 4, seed=1, epochs=9)[3]
        != PromptSteps(10, 4, seed=2, epochs=2)[3]
    )
    assert (
        len(PromptSteps(10, 4, seed=1, epochs=1, max_steps=7)) == 7
        and len(PromptSteps(3, 4, seed=1, epochs=1)) == 1
    )
    with pytest.raises(IndexError):
        steps[5]

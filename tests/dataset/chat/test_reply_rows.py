"""Rows with tools, calls and results: what is trained is what the assistant wrote, and a chat shows
the model the same ids.
"""

import json

import pytest

from dataset.chat.format import (
    canonical_json,
    encode_conversation,
    encode_prompt,
    normalize_conversation,
)
from dataset.chat.reply import parse_reply
from dataset.files.jsonl import read_rows
from dataset.lm_dataset import ROOT, SFTDataset
from dataset.toy.rows import question_of_item, sft_row, turn_messages
from dataset.toy.scorer import ask
from dataset.toy.world import make_world
from tests.helpers.rows import write

CORPORA = ROOT.parent / "shared" / "data" / "sft"
REAL = [
    "sft_zh_toolcall_glaive",
    "sft_en_toolcall_glaive",
    "sft_en_toolcall_sgd",
    "sft_en_reason_tooluse",
]
ROWS_OF_EACH = 60


def real_rows(name):
    path = CORPORA / f"{name}.jsonl.xz"
    if not path.is_file():
        pytest.skip("the real corpora are not here")
    return [row for _, (_, row) in zip(range(ROWS_OF_EACH), read_rows(path))]


def toy_rows(level):
    return [
        sft_row(item, None)
        for item in make_world(level).items("test", "tools", "train", ROWS_OF_EACH)
    ]


def trained_spans(tokenizer, row):
    """The text of each run of trained tokens."""
    is_target, spans = row["labels"] != -100, []
    for i, target in enumerate(is_target):
        if target and not is_target[i - 1]:
            spans.append([])
        if target:
            spans[-1].append(row["input_ids"][i])
    return [tokenizer.decode(span) for span in spans]


def calls_of(message):
    calls = [call.get("function", call) for call in message.get("tool_calls") or ()]
    return [
        (
            call["name"],
            json.loads(call["arguments"])
            if isinstance(call["arguments"], str)
            else call["arguments"],
        )
        for call in calls
    ]


@pytest.mark.parametrize("source", ["mini", "full", *REAL])
def test_each_trained_span_reads_back_as_the_assistants_message(source, tokenizer, tmp_path):
    """And there is one for each of its messages: neither tools, questions nor results are trained
    on.
    """
    rows = toy_rows(source) if source in ("mini", "full") else real_rows(source)
    dataset = SFTDataset(
        write(tmp_path / "rows.jsonl", rows),
        tokenizer,
        30_000,
        cache_dir=tmp_path / "cache",
        num_proc=1,
    )
    assert len(dataset) == len(rows)
    seen = 0
    for row, encoded in zip(rows, dataset):
        messages, _ = normalize_conversation(row["conversations"])
        asked = max(i for i, message in enumerate(messages) if message["role"] == "user")
        said = [
            (i, message) for i, message in enumerate(messages) if message["role"] == "assistant"
        ]
        spans = trained_spans(tokenizer, encoded)
        assert len(spans) == len(said)
        for span, (i, message) in zip(spans, said):
            assert span.endswith("<|im_end|>")
            read = parse_reply(span.removesuffix("<|im_end|>"))
            assert read["content"].strip() == (message.get("content") or "").strip()
            assert calls_of(read) == calls_of(message)
            if i > asked:
                assert read.get("reasoning_content", "") == message.get(
                    "reasoning_content", ""
                ).strip("\n")
            seen += bool(calls_of(message))
        text = tokenizer.decode(encoded["input_ids"])
        for schema in messages[0].get("tools") or ():
            assert schema.get("function", schema)["name"] in text.partition("</tools>")[0]
        results = (message["content"] for message in messages if message["role"] == "tool")
        assert all(canonical_json(result) in text for result in results)
    assert seen >= 15


@pytest.mark.parametrize("level", ["mini", "full"])
def test_the_loop_of_calls_shows_the_ids_that_were_trained_on(level, tokenizer):
    """Prompt by prompt, when the model says word for word what a training row says."""
    for item in make_world(level).items("test", "tools", "train", ROWS_OF_EACH):
        ids, is_target = encode_conversation(tokenizer, turn_messages(item))
        starts = [i for i, target in enumerate(is_target) if target and not is_target[i - 1]]
        seen = []

        def repeat(messages, tools, ids=ids, is_target=is_target, starts=starts, seen=seen):
            prompt = encode_prompt(tokenizer, messages, tools)
            assert prompt == ids[: starts[len(seen)]]
            seen.append(prompt)
            end = (
                next(i for i in range(len(prompt), len(ids)) if not is_target[i]) - 1
            )  # without <|im_end|>
            return tokenizer.decode(ids[len(prompt) : end])

        assert ask(question_of_item(item), repeat)[0] and len(seen) == 2

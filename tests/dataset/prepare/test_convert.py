import json

import pyarrow
import pytest
from pyarrow import parquet

from dataset.chat.format import check_conversation
from dataset.files.jsonl import read_rows
from dataset.prepare.convert import convert, convert_row, detect

USER, ASSISTANT = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
TOOLS = [{"type": "function", "function": {"name": "clock", "parameters": {}}}]
CALL = {"name": "clock", "arguments": {"city": "Oslo"}}


@pytest.mark.parametrize(
    ("format", "row", "wanted"),
    [
        ("text", {"text": "T", "url": "u"}, {"text": "T"}),
        ("text", {"content": "T"}, {"text": "T"}),
        (
            "alpaca",
            {"instruction": "Q", "input": "", "output": "A"},
            {"conversations": [USER, ASSISTANT]},
        ),
        (
            "alpaca",
            {
                "instruction": "Q",
                "input": "I",
                "output": "A",
                "system": "S",
                "history": [["q", "a"]],
            },
            {
                "conversations": [
                    {"role": "system", "content": "S"},
                    {"role": "user", "content": "q"},
                    {"role": "assistant", "content": "a"},
                    {"role": "user", "content": "Q\nI"},
                    ASSISTANT,
                ]
            },
        ),
        ("alpaca", {"question": "Q", "answer": "A"}, {"conversations": [USER, ASSISTANT]}),
        (
            "alpaca",
            {"system_prompt": "S", "question": "Q", "response": "A", "reasoning": "R"},
            {
                "conversations": [
                    {"role": "system", "content": "S"},
                    USER,
                    {**ASSISTANT, "reasoning_content": "R"},
                ]
            },
        ),
        (
            "alpaca",
            {"question": "Q", "context": "C", "answer": "A"},
            {"conversations": [{**USER, "content": "Q\nC"}, ASSISTANT]},
        ),
        (
            "alpaca",
            {"prompt": "Q", "input": "I", "output": "A"},
            {"conversations": [{**USER, "content": "Q\nI"}, ASSISTANT]},
        ),
        (
            "alpaca",
            {"instruction": "", "input": "Q", "output": "A"},
            {"conversations": [USER, ASSISTANT]},
        ),
        (
            "alpaca",
            {"prompt": "Q", "completion": "[1, 2]"},
            {"conversations": [USER, {"role": "assistant", "content": "[1, 2]"}]},
        ),
        (
            "sharegpt",
            {
                "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}],
                "system": "S",
            },
            {"conversations": [{"role": "system", "content": "S"}, USER, ASSISTANT]},
        ),
        (
            "sharegpt",
            {
                "conversations": [
                    {"from": "human", "value": "Q"},
                    {"from": "function_call", "value": json.dumps(CALL)},
                    {"from": "observation", "value": "19:02"},
                    {"from": "gpt", "value": "A"},
                ],
                "tools": json.dumps(TOOLS),
            },
            {
                "conversations": [
                    {"role": "system", "content": "", "tools": json.dumps(TOOLS)},
                    USER,
                    {"role": "assistant", "content": "", "tool_calls": json.dumps([CALL])},
                    {"role": "tool", "content": "19:02"},
                    ASSISTANT,
                ]
            },
        ),
        (
            "sharegpt",
            {
                "conversations": [
                    {"from": "human", "value": "Q"},
                    {"from": "gpt", "value": "A", "reasoning_content": "R"},
                ]
            },
            {"conversations": [USER, {**ASSISTANT, "reasoning_content": "R"}]},
        ),
        (
            "messages",
            {
                "messages": [
                    {"role": "system", "content": ""},
                    USER,
                    {"role": "function_call", "content": json.dumps(CALL)},
                    {"role": "function", "content": "19:02"},
                    ASSISTANT,
                ],
                "functions": TOOLS,
            },
            {
                "conversations": [
                    {"role": "system", "content": "", "tools": json.dumps(TOOLS)},
                    USER,
                    {"role": "assistant", "content": "", "tool_calls": json.dumps([CALL])},
                    {"role": "tool", "content": "19:02"},
                    ASSISTANT,
                ]
            },
        ),
        (
            "messages",
            {
                "messages": [
                    {"role": "developer", "content": "S"},
                    {"role": "user", "content": [{"type": "text", "text": "Q"}]},
                    {**ASSISTANT, "reasoning_content": "R", "refusal": None},
                ]
            },
            {
                "conversations": [
                    {"role": "system", "content": "S"},
                    USER,
                    {**ASSISTANT, "reasoning_content": "R"},
                ]
            },
        ),
        (
            "messages",
            {
                "messages": [
                    USER,
                    {
                        "role": "assistant",
                        "content": None,
                        "tool_calls": [{"id": "1", "function": CALL}],
                    },
                    {"role": "tool", "tool_call_id": "1", "content": "19:02"},
                    ASSISTANT,
                ],
                "tools": TOOLS,
            },
            {
                "conversations": [
                    {"role": "system", "content": "", "tools": json.dumps(TOOLS)},
                    USER,
                    {
                        "role": "assistant",
                        "content": "",
                        "tool_calls": json.dumps([{"id": "1", "function": CALL}]),
                    },
                    {"role": "tool", "content": "19:02"},
                    ASSISTANT,
                ]
            },
        ),
        (
            "messages",
            {"conversations": [USER], "answer": "4", "source": "x"},
            {"conversations": [USER], "answer": "4"},
        ),
        (
            "preference",
            {"prompt": "Q", "chosen": "A", "rejected": "[]"},
            {
                "chosen": [USER, ASSISTANT],
                "rejected": [USER, {"role": "assistant", "content": "[]"}],
            },
        ),
        (
            "preference",
            {
                "chosen": [USER, ASSISTANT],
                "rejected": [USER, {"role": "assistant", "content": "B"}],
                "prompt": "Q",
            },
            {
                "chosen": [USER, ASSISTANT],
                "rejected": [USER, {"role": "assistant", "content": "B"}],
            },
        ),
        (
            "preference",
            {
                "conversations": [{"from": "human", "value": "Q"}],
                "chosen": {"from": "gpt", "value": "A"},
                "rejected": {"from": "gpt", "value": "B"},
                "system": "S",
            },
            {
                "chosen": [{"role": "system", "content": "S"}, USER, ASSISTANT],
                "rejected": [
                    {"role": "system", "content": "S"},
                    USER,
                    {"role": "assistant", "content": "B"},
                ],
            },
        ),
        (
            "preference",
            {"instruction": "Q", "history": [["q", "a"]], "chosen": "A", "rejected": "B"},
            {
                side: [
                    {**USER, "content": "q"},
                    {**ASSISTANT, "content": "a"},
                    USER,
                    {**ASSISTANT, "content": text},
                ]
                for side, text in (("chosen", "A"), ("rejected", "B"))
            },
        ),
        (
            "preference",
            {
                "prompt": [USER],
                "chosen": [ASSISTANT],
                "rejected": [{"role": "assistant", "content": "B"}],
            },
            {
                "chosen": [USER, ASSISTANT],
                "rejected": [USER, {"role": "assistant", "content": "B"}],
            },
        ),
    ],
)
def test_formats(format, row, wanted):
    assert detect(row) == format
    assert convert_row(row) == convert_row(row, format) == wanted
    for key, messages in wanted.items():
        if key in ("conversations", "chosen", "rejected"):
            check_conversation(messages)
            assert convert_row(wanted) == wanted  # ours stays ours


def test_a_conversion_renders(tmp_path):
    from transformers import AutoTokenizer

    from dataset.chat.format import encode_conversation
    from dataset.lm_dataset import ROOT

    row = convert_row(
        {
            "conversations": [
                {"from": "human", "value": "time?"},
                {"from": "function_call", "value": json.dumps(CALL)},
                {"from": "observation", "value": "19:02"},
                {"from": "gpt", "value": "It is 19:02."},
            ],
            "tools": json.dumps(TOOLS),
        }
    )
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "model")
    text = tokenizer.decode(encode_conversation(tokenizer, row["conversations"])[0])
    assert '"clock"' in text and "Oslo" in text and "19:02" in text and "<tool_call>" in text


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"x": 1, "y": 2}, "the keys x, y fit no format"),
        ({}, r"the keys \(none\) fit no format"),
        ({"text": " \n"}, "no text"),
        ({"instruction": "Q", "output": ""}, "no answer, or an empty one"),
        ({"instruction": "Q", "output": 4}, "output is a int"),
        ({"instruction": "Q", "output": "A", "history": ["q"]}, "history: a turn is no pair"),
        (
            {"conversations": [{"from": "narrator", "value": "x"}]},
            "message 0 has the unknown role 'narrator'",
        ),
        ({"conversations": [{"from": "human", "value": "Q"}]}, "no message of the assistant"),
        (
            {"conversations": [{"from": "function_call", "value": "clock"}]},
            "message 0: the call is not JSON",
        ),
        (
            {"conversations": [{"role": ["user"], "content": "x"}]},
            r"message 0 has the unknown role \['user'\]",
        ),
        (
            {"messages": [{"role": "system", "content": "S"}, USER, ASSISTANT], "system": "other"},
            "differ in their content",
        ),
        (
            {"messages": [USER, {**ASSISTANT, "reasoning_content": ["R"]}]},
            "reasoning_content is no string",
        ),
        (
            {"question": "Q", "answer": "A", "image": "cat.png"},
            "image cannot be learned, only text",
        ),
        ({"text": "a", None: ["b"]}, "more fields than the table's first line"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "content of type NoneType"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ASSISTANT]},
            "message 0 has a part that is no text",
        ),
        ({"chosen": "A", "rejected": "B"}, "chosen holds only the answer, and there is no prompt"),
        ({"prompt": "Q", "chosen": "A", "rejected": ""}, "rejected does not end with an answer"),
        ({"prompt": "Q", "chosen": "A", "rejected": None}, "rejected is NoneType, or empty"),
        (
            {
                "chosen": [USER, ASSISTANT],
                "rejected": [{"role": "user", "content": "other"}, ASSISTANT],
            },
            "begin differently",
        ),
    ],
)
def test_rows_that_fit_nothing(row, message):
    with pytest.raises(ValueError, match=message):
        convert_row(row)


def test_fields_that_parquet_adds_are_taken_away(tmp_path):
    rows = [
        {
            "messages": [
                USER,
                {"role": "assistant", "tool_calls": [{"name": name, "arguments": arguments}]},
            ],
            "answer": answer,
        }
        for name, arguments, answer in (
            ("clock", {"city": "Oslo"}, None),
            ("sum", {"a": 1, "b": 2}, "3"),
        )
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    convert([str(tmp_path / "a.parquet")], str(tmp_path / "b.jsonl"))
    found = [row for _, row in read_rows(tmp_path / "b.jsonl")]
    assert [json.loads(row["conversations"][1]["tool_calls"]) for row in found] == [
        [{"name": "clock", "arguments": {"city": "Oslo"}}],
        [{"name": "sum", "arguments": {"a": 1, "b": 2}}],
    ]
    assert "answer" not in found[0] and found[1]["answer"] == "3"


def test_a_bad_row_stops_or_is_named(tmp_path):
    source, out = tmp_path / "a.jsonl", tmp_path / "out" / "b.jsonl.gz"
    source.write_text(
        '{"text": "T", "url": "u"}\n\n{"x": 1}\n{"instruction": "Q", "output": "A", "id": 7, "n": '
        '""}\n{bad\n'
        '{"text": "\\ud800"}\n',
        encoding="utf-8",
    )
    with pytest.raises(ValueError, match=r"a\.jsonl:3: the keys x fit no format"):
        convert([str(source)], str(out))
    assert not out.exists() and not list(out.parent.iterdir())
    report = convert([str(source)], str(out), bad_rows="skip")
    assert (report.rows_read, report.rows_written, report.rows_skipped) == (5, 2, 3)
    assert report.formats == {"text": 1, "alpaca": 1} and all(
        f"a.jsonl:{line}: " in str(report) for line in (3, 5, 6)
    )
    assert "left out: url (1 rows), id (1 rows)\n" in str(report)
    assert [row for _, row in read_rows(out)] == [
        {"text": "T"},
        {"conversations": [USER, ASSISTANT]},
    ]


def test_calls_in_texts_and_in_messages_of_their_own_are_one_turn():
    hermes = [
        {"from": "human", "value": "Q"},
        {"from": "gpt", "value": f"<tool_call>\n{json.dumps(CALL)}\n</tool_call>"},
        {"from": "tool", "value": "<tool_response>\n19:02\n</tool_response>"},
        {"from": "gpt", "value": "A"},
    ]
    swift = [
        USER,
        {"role": "assistant", "content": "I look."},
        {"role": "tool_call", "content": json.dumps(CALL)},
        {"role": "tool_response", "content": {"time": "19:02"}},
        ASSISTANT,
    ]
    for row, text, result in (
        ({"conversations": hermes, "tools": json.dumps(TOOLS)}, "", "19:02"),
        ({"messages": swift, "tools": TOOLS}, "I look.", '{"time": "19:02"}'),
    ):
        system, question, call, observed, answer = convert_row(row)["conversations"]
        assert json.loads(system["tools"]) == TOOLS and (question, answer) == (USER, ASSISTANT)
        assert call["content"] == text and json.loads(call["tool_calls"]) == [CALL]
        assert observed == {"role": "tool", "content": result}


def test_an_answer_of_weight_zero_is_kept_and_marked():
    row = {"messages": [USER, {**ASSISTANT, "weight": 0}, USER, {**ASSISTANT, "weight": 1}]}
    assert convert_row(row)["conversations"] == [
        USER,
        {**ASSISTANT, "train": False},
        USER,
        ASSISTANT,
    ]


def test_keys_of_messages_that_are_left_out_are_named(tmp_path):
    row = {"messages": [{**USER, "name": "Ann"}, ASSISTANT]}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    assert "left out: name of messages (1 rows)" in str(
        convert([tmp_path / "a.jsonl"], tmp_path / "b.jsonl")
    )


def test_datasets_reads_strings_of_a_converted_file_as_strings(tmp_path):
    """It takes "007" for 7 in a column whose rows differ in type; here no column does."""
    datasets = pytest.importorskip("datasets")
    rows = [
        {"messages": [{**USER, "content": text}, ASSISTANT], "tools": tools}
        for text, tools in (("007", TOOLS), ("null", None), ("[1]", json.dumps(TOOLS)))
    ]
    rows.append({"messages": [USER, {**ASSISTANT, "content": None, "tool_calls": [CALL]}]})
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    convert([tmp_path / "a.jsonl"], tmp_path / "b.jsonl")
    read = datasets.load_dataset(
        "json", data_files=str(tmp_path / "b.jsonl"), split="train", cache_dir=str(tmp_path)
    )
    for row, (_, ours) in zip(read, read_rows(tmp_path / "b.jsonl"), strict=True):
        found = [
            {key: value for key, value in message.items() if value is not None}
            for message in row["conversations"]
        ]
        assert found == ours["conversations"]


def test_an_empty_answer_is_refused_but_not_after_a_prompt_with_a_checkable_answer():
    row = {"messages": [USER, {**ASSISTANT, "content": " "}]}
    with pytest.raises(ValueError, match="message 1: the answer is empty"):
        convert_row(row)
    assert convert_row({**row, "gt": ["A"]})["gt"] == ["A"]


def test_rows_that_were_read_from_other_spellings_are_counted(tmp_path):
    def row(answer):
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}]
        return json.dumps({"messages": turns})

    call = '<tool_call>{"name": "c", "arguments": {}}</tool_call>'
    rows = [row("b"), row("<think>why</think>b"), row(call)]
    (tmp_path / "a.jsonl").write_text("\n".join(rows), encoding="utf-8")
    report = convert([str(tmp_path / "a.jsonl")], str(tmp_path / "b.jsonl"))
    assert (report.rows_written, report.rows_respelled) == (3, 2)
    assert "read from another spelling: 2 rows" in str(report)

"""Rows of a teacher's completions: from our own server, from a server that fails now and then, and
from a checkpoint.
"""

import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer

from dataset.chat.format import encode_conversation, encode_prompt
from dataset.lm_dataset import SFTDataset
from dataset.toy.tools import tool_schemas
from model.engine import Engine
from model.sampling import SamplingParams
from scripts import make_teacher_rows
from scripts.openai_api.client import as_call, as_request
from scripts.teacher.rows import MOST_REFUSED
from scripts.teacher.teachers import as_message
from tests.helpers.checkpoints import ROOT
from tests.helpers.served import small_network

TOOLS = json.dumps(tool_schemas(("calculator",)))
CALL = json.dumps([{"name": "calculator", "arguments": {"expression": "6 * 7"}}])
ROWS = [
    {"prompt": "What is 1 plus 1?", "answer": "2", "skill": "arithmetic"},
    {
        "conversations": [
            {"role": "user", "content": "2 plus 2?"},
            {"role": "assistant", "content": "old"},
            {"role": "user", "content": "And 3 plus 3?"},
            {"role": "assistant", "content": "older"},
        ],
        "answer": "6",
    },
    {
        "conversations": [
            {"role": "system", "content": "", "tools": TOOLS},
            {"role": "user", "content": "6 times 7?"},
            {"role": "assistant", "content": "", "tool_calls": CALL},
            {"role": "tool", "content": '{"result": 42}'},
            {"role": "assistant", "content": "forty-two"},
        ]
    },
]
SAME = {"prompt": "What is 1 plus 1?", "answer": "2"}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


@pytest.fixture
def make(tmp_path):
    """make(rows, **flags): run the script; returns (rows written, rows dropped, the figures)."""

    def run(rows, *switches, **flags):
        prompts, figures = write(tmp_path / "prompts.jsonl", rows), tmp_path / "figures.json"
        options = {"data_path": prompts, "out": tmp_path / "out.jsonl", "json": figures, **flags}
        make_teacher_rows.main(
            [*(part for name, x in options.items() for part in (f"--{name}", str(x))), *switches]
        )
        out = options["out"]
        return read(out), read(out.with_suffix(".dropped.jsonl")), json.loads(figures.read_text())

    return run


class Fake:
    """A server: `replies` maps the last message's content to a choice (or to a status); the first
    `failures` requests fail.
    """

    def __init__(self, replies, failures=0, failure=503):
        self.replies, self.failures, self.failure, self.requests = replies, failures, failure, []
        outer, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.send(
                    200,
                    {
                        "object": "list",
                        "data": [{"id": "fake", "object": "model", "created": 0, "owned_by": "us"}],
                    },
                )

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    outer.requests.append({**body, "key": self.headers["Authorization"]})
                    outer.failures -= 1
                    fails = outer.failures >= 0
                reply = outer.replies.get(body["messages"][-1]["content"], {"content": "2"})
                if fails or isinstance(reply, int):
                    status = outer.failure if fails else reply
                    return self.send(
                        status,
                        {
                            "error": {
                                "message": f"no, {status}",
                                "type": "x",
                                "param": None,
                                "code": None,
                            }
                        },
                    )
                choice = {
                    "index": 0,
                    "finish_reason": reply.get("finish_reason", "stop"),
                    "logprobs": None,
                    "message": {
                        "role": "assistant",
                        **{name: x for name, x in reply.items() if name != "finish_reason"},
                    },
                }
                self.send(
                    200,
                    {
                        "id": "1",
                        "object": "chat.completion",
                        "created": 0,
                        "model": "fake",
                        "choices": [choice],
                    },
                )

            def send(self, status, body):
                data = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.send_header("retry-after-ms", "1")
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def fake():
    """fake(...): a Fake, which ends with the test."""
    made = []

    def start(*args, **options):
        made.append(Fake(*args, **options))
        return made[-1]

    yield start
    for one in made:
        one.server.shutdown()
        one.server.server_close()


def fake_teacher(fake, failures=0):
    """Reasons about the second of ROWS, and calls a tool for the third."""
    call = {
        "id": "a",
        "type": "function",
        "function": {"name": "calculator", "arguments": '{"expression": "42"}'},
    }
    replies = {
        "And 3 plus 3?": {"content": "6", "reasoning_content": "3 and 3"},
        '{"result": 42}': {"content": None, "tool_calls": [call], "finish_reason": "tool_calls"},
    }
    return fake(replies, failures=failures)


def test_a_server_that_fails_a_few_times_is_asked_again(fake, make):
    server = fake_teacher(fake, failures=3)
    rows, dropped, figures = make(
        [*ROWS, SAME], base_url=server.url, temperature=0.5, max_new_tokens=9, concurrency=2
    )
    by_length = sorted(rows, key=lambda row: len(row["conversations"]))
    assert by_length[0] == {
        "conversations": [
            {"role": "user", "content": "What is 1 plus 1?"},
            {"role": "assistant", "content": "2"},
        ],
        "teacher": "fake",
        "sample": 0,
        "answer": "2",
        "skill": "arithmetic",
        "settings": {"temperature": 0.5, "max_new_tokens": 9, "seed": 42, "keep_right": False},
    }
    assert by_length[1]["conversations"] == [
        *ROWS[1]["conversations"][:3],
        {"role": "assistant", "content": "6", "reasoning_content": "3 and 3"},
    ]
    assert by_length[2]["conversations"] == [
        *ROWS[2]["conversations"][:4],
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"name": "calculator", "arguments": '{"expression": "42"}'}],
        },
    ]
    assert (
        not dropped
        and figures["written"] == 3
        and figures["repeated_prompts"] == 1
        and len(server.requests) == 6
    )


def test_a_request_has_the_tools_the_settings_and_the_key(fake, make, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    server = fake_teacher(fake)
    make(ROWS, base_url=server.url, temperature=0.5, max_new_tokens=9)
    request = next(one for one in server.requests if "tools" in one)
    assert request["messages"] == [
        {"role": "user", "content": "6 times 7?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {
                    "id": "call_2_0",
                    "type": "function",
                    "function": {"name": "calculator", "arguments": '{"expression": "6 * 7"}'},
                }
            ],
        },
        {"role": "tool", "content": '{"result": 42}', "tool_call_id": "call_2_0"},
    ]
    assert request["tools"] == json.loads(TOOLS)
    expected = {"model": "fake", "temperature": 0.5, "max_tokens": 9, "key": "Bearer secret"}
    assert {name: request[name] for name in expected} == expected


def test_the_rows_are_data_for_fine_tuning(fake, make, tmp_path):
    """The targets end with the teacher's own message."""
    rows, _, _ = make(ROWS, base_url=fake_teacher(fake).url)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "model")
    dataset = SFTDataset(
        [str(tmp_path / "out.jsonl")], tokenizer, 512, num_proc=1, cache_dir=tmp_path / "cache"
    )
    assert len(dataset) == 3
    longest = max((row["conversations"] for row in rows), key=len)
    ids, is_target = encode_conversation(tokenizer, longest)
    last = tokenizer.decode([token for token, target in zip(ids, is_target) if target])
    assert last.endswith(
        '<tool_call>\n{"name": "calculator", "arguments": {"expression": '
        '"42"}}\n</tool_call><|im_end|>'
    )


def test_only_what_is_missing_is_asked(fake, make, tmp_path):
    """Also after a process was killed while it wrote a line, and with more samples than before."""
    server = fake({})
    first, _, _ = make(ROWS[:2], base_url=server.url)
    out = tmp_path / "out.jsonl"
    whole = out.read_text().splitlines(keepends=True)
    out.write_text(whole[0] + whole[1][:-9])  # what was written last is half there
    rows, _, figures = make(ROWS[:2], base_url=server.url)
    assert (
        sorted(map(str, rows)) == sorted(map(str, first))
        and len(server.requests) == 3
        and figures["there_before"] == 1
    )
    seeds = [one["seed"] for one in server.requests]
    assert (
        len(set(seeds)) == 2 and seeds[2] in seeds[:2]
    )  # the same answer is asked for with the same seed
    rows, _, _ = make(ROWS[:2], base_url=server.url, num_samples=3)
    assert len(server.requests) == 3 + 4 and Counter(row["sample"] for row in rows) == {
        0: 2,
        1: 2,
        2: 2,
    }
    assert len({one["seed"] for one in server.requests}) == 6
    make(ROWS[:2], base_url=server.url, num_samples=3)
    assert len(server.requests) == 7
    with pytest.raises(
        ValueError, match="holds completions of 'fake', not of 'other': give another --out"
    ):
        make(ROWS[:2], base_url=server.url, model="other")


@pytest.mark.parametrize(
    "name, content, message",
    [
        (
            "out.jsonl",
            '{"prompt": "a"}\n{"prompt": "b"}',
            "holds completions of None, not of 'fake'",
        ),  # a file of the user's own
        ("out.jsonl", '{"prompt": "a"}', "holds no whole row: delete it"),
        ("out.jsonl", "a list\nof things", ":1: not JSON"),
        (
            "out.dropped.jsonl",
            '{"teacher": "other"}\n{"prompt": "b"}',
            "holds completions of 'other'",
        ),
    ],
)
def test_a_file_that_is_not_ours_is_left_as_it_is(name, content, message, fake, make, tmp_path):
    server = fake({})
    make(ROWS[:1], base_url=server.url)
    half = (tmp_path / "out.jsonl").read_text() + '{"half'
    (tmp_path / "out.jsonl").write_text(half)
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f"{name}.*{message}"):
        make(ROWS[:2], base_url=server.url)
    assert (tmp_path / name).read_text() == content and len(server.requests) == 1
    assert (tmp_path / "out.jsonl").read_text() == (content if name == "out.jsonl" else half)


@pytest.mark.parametrize(
    "change", [{"temperature": 0.5}, {"seed": 1}, {"max_new_tokens": 7}, {"keep_right": 1}]
)
def test_answers_with_other_settings_go_to_another_file(change, fake, make, tmp_path):
    server = fake({})
    make(ROWS[:1], base_url=server.url)
    with pytest.raises(
        ValueError,
        match=r"holds completions with the settings .*: give another --out, or set them back",
    ):
        make(ROWS[:2], base_url=server.url, **change)
    assert len(
        make(ROWS[:2], base_url=server.url, out=tmp_path / "other.jsonl", **change)[0]
    ) == 1 + ("keep_right" not in change)


def test_answers_that_teach_nothing_good_are_dropped_once_and_for_all(fake, make):
    server = fake(
        {
            "a": {"content": "endless", "finish_reason": "length"},
            "b": {"content": " "},
            "c": {"content": "It is 7."},
            "d": {"content": "", "finish_reason": "content_filter"},
            "f": {"content": "The answer is 5."},
        }
    )
    questions = [
        {"prompt": "a"},
        {"prompt": "b"},
        {"prompt": "c", "answer": "5"},
        {"prompt": "d"},
        {"prompt": "e"},
        {"prompt": "f", "answer": 5},
    ]
    rows, dropped, figures = make(questions, "--keep_right", base_url=server.url)
    assert {row["conversations"][0]["content"] for row in rows} == {
        "e",
        "f",
    }  # e has nothing to compare with
    assert {row["conversations"][0]["content"]: row["dropped"] for row in dropped} == {
        "a": "length",
        "b": "empty",
        "c": "wrong",
        "d": "content_filter",
    }
    assert figures["dropped"] == {"length": 1, "empty": 1, "wrong": 1, "content_filter": 1}
    make(questions, "--keep_right", base_url=server.url)
    assert len(server.requests) == len(questions)


def test_a_row_that_the_server_refuses_is_left_out_and_asked_again_next_time(fake, make):
    server = fake({"too long": 400})
    rows, dropped, figures = make([{"prompt": "too long"}, {"prompt": "fine"}], base_url=server.url)
    assert (
        [row["conversations"][0]["content"] for row in rows] == ["fine"]
        and not dropped
        and figures["refused"] == 1
    )
    server.replies = {}
    rows, _, figures = make([{"prompt": "too long"}, {"prompt": "fine"}], base_url=server.url)
    assert len(rows) == 2 and figures["refused"] == 0


def test_a_server_that_refuses_everything_is_not_asked_everything(fake, make, tmp_path):
    server = fake({}, failures=1000, failure=400)
    with pytest.raises(ValueError, match=r"fake answers nothing. .*prompts.jsonl:1: .*no, 400"):
        make([{"prompt": f"{i}"} for i in range(100)], base_url=server.url, concurrency=1)
    assert len(server.requests) == MOST_REFUSED and not read(tmp_path / "out.dropped.jsonl")


@pytest.mark.parametrize("status, asked", [(401, 1), (500, 3)])
def test_a_server_that_breaks_down_loses_nothing(status, asked, fake, make, tmp_path):
    server = fake({f"{i}": {"content": f"{i}"} for i in range(4)} | {"4": status})
    with pytest.raises(
        OSError, match=rf"{server.url}: .*no, {status}.*The completions so far .*out.jsonl: resume"
    ):
        make([{"prompt": f"{i}"} for i in range(9)], base_url=server.url, concurrency=1, retries=2)
    assert [row["conversations"][1]["content"] for row in read(tmp_path / "out.jsonl")] == [
        "0",
        "1",
        "2",
        "3",
    ]
    assert len(server.requests) == 4 + asked
    server.replies = {}
    assert len(make([{"prompt": f"{i}"} for i in range(9)], base_url=server.url)[0]) == 9
    assert len(server.requests) == 4 + asked + 5


def test_nobody_there(make):
    with pytest.raises(OSError, match=r"http://127.0.0.1:9/v1: Connection error"):
        make(ROWS[:1], base_url="http://127.0.0.1:9/v1", retries=0)


def test_our_own_server_is_a_teacher(server, make):
    """It writes nonsense; what counts is that it takes each of our requests."""
    rows, dropped, figures = make(ROWS, base_url=f"{server.url}/v1", max_new_tokens=50)
    assert len(rows) + len(dropped) == 3 and figures["refused"] == 0
    assert {row["dropped"] for row in dropped} <= {"length"}
    for row in rows + dropped:
        row["conversations"][-1].pop("tool_calls", None)
        assert row["teacher"] == "chat" and row["conversations"][-1]["content"]


@pytest.fixture
def checkpoint(tmp_path):
    """Folder of a small network; the same as that of the server's "chat"."""
    model, tokenizer = small_network(0)
    model.save_pretrained(tmp_path / "out" / "chat_32x1")
    tokenizer.save_pretrained(tmp_path / "out" / "chat_32x1")
    return tmp_path / "out" / "chat_32x1"


def test_a_checkpoint_answers_as_its_engine_does_and_as_its_server_does(
    checkpoint, server, make, tmp_path
):
    flags = dict(temperature=0, max_new_tokens=50)
    rows, dropped, _ = make(ROWS, weight="chat", save_dir=tmp_path / "out", device="cpu", **flags)
    assert len(rows) + len(dropped) == 3
    model, tokenizer = small_network(0)
    engine = Engine(model, tokenizer, 1)
    for row in rows + dropped:
        (request,) = engine.generate(
            [encode_prompt(tokenizer, row["conversations"][:-1])], SamplingParams(0, max_tokens=50)
        )
        assert row["conversations"][-1]["content"].strip() == request.text.strip()
    served = make(
        ROWS[:2], base_url=f"{server.url}/v1", model="chat", out=tmp_path / "served.jsonl", **flags
    )
    answers = {str(row["conversations"]) for row in rows + dropped}
    assert {str(row["conversations"]) for row in served[0] + served[1]} < answers
    prompt = ROWS[2]["conversations"][
        :-1
    ]  # with tools on offer the server writes by a grammar, but reads the same
    request = as_request(prompt)
    assert encode_prompt(tokenizer, request["messages"], request["tools"]) == encode_prompt(
        tokenizer, prompt
    )


def test_a_checkpoint_that_only_continues_text_is_no_teacher(checkpoint, make):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.chat_template = None
    (checkpoint / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(checkpoint)
    with pytest.raises(ValueError, match="only continues text"):
        make(ROWS, weight=checkpoint)


@pytest.mark.parametrize(
    "rows, message",
    [
        ([{"text": "a"}], r"prompts.jsonl:1: neither \"prompt\" nor"),
        ([{"prompt": None}], r"prompts.jsonl:1: message 0 .user. has"),
        (
            [{"prompt": "a"}, {"conversations": [{"role": "assistant", "content": "a"}]}],
            "prompts.jsonl:2: there is nothing",
        ),
        ([{"conversations": []}], r"prompts.jsonl:1: .*at least one message"),
        ([{"conversations": [{"role": "system", "content": "a"}]}], "nothing to answer"),
    ],
)
def test_bad_rows_are_named(rows, message, make):
    with pytest.raises(ValueError, match=message):
        make(rows, weight="nobody")


@pytest.mark.parametrize(
    "flags, message",
    [
        ({}, "either --weight"),
        (dict(weight="a", base_url="b"), "either --weight"),
        (dict(weight="a", out=Path("x.json")), "ends in .jsonl"),
        (dict(weight="a", model="b"), "--model has an effect with --base_url only"),
        (
            dict(base_url="a", device="cpu", dtype="float32"),
            "--device and --dtype has an effect with --weight only",
        ),
        (dict(weight="a", num_samples=2, temperature=0), "gives the same completion each time"),
    ],
)
def test_flags_that_make_no_sense_are_refused(flags, message, make, capsys):
    with pytest.raises(SystemExit):
        make(ROWS, **flags)
    assert message in capsys.readouterr().err


def test_nothing_to_compare_with(make):
    with pytest.raises(ValueError, match=r'no row of .*prompts.jsonl has an "answer"'):
        make([{"prompt": "a"}], "--keep_right", weight="nobody")


def test_names_of_reasoning_and_arguments_of_both_kinds():
    assert as_message(SimpleNamespace(content="a", reasoning="b", tool_calls=None)) == {
        "role": "assistant",
        "content": "a",
        "reasoning_content": "b",
    }
    assert [
        as_call({"name": "f", **arguments})["function"]["arguments"]
        for arguments in ({"arguments": '{"a": 1}'}, {"arguments": {"a": "é"}}, {})
    ] == ['{"a": 1}', '{"a": "é"}', "{}"]

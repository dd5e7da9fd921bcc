"""The registry of tools: schemas against transformers', arguments against jsonschema, and calls
that may go wrong.
"""

import enum
import json
import re
import threading
import time
from typing import Literal

import jsonschema
import pytest
from transformers.utils import get_json_schema

from dataset.chat.tools import ToolBox, load_tools, mismatch, schema_of, tool
from dataset.toy.tools import SCHEMAS, TOY_TOOLS, run_tool


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


def everything(
    text: str,
    count: int,
    size: float,
    sure: bool,
    names: list[str],
    table: dict[str, int],
    way: Literal["up", "down", 1],
    either: int | str,
    pair: tuple[int, str],
    shade: Colour,
    maybe: int | None = None,
    mixed: list[int] | bool = False,
    anything: dict = {},  # noqa: B006  the schema has no default
):
    """Take arguments of each kind.

    Args:
        text: A text.
        count: A number,
            which is whole.
        size: A number.
        sure: Yes or no.
        names: Some texts.
        table: Numbers by name.
        way: One of three.
        either: One of two.
        pair: Two things.
        shade: A colour.
        maybe: A number or nothing.
        mixed: Several or one.
        anything: An object.

    Returns:
        What it was given.
    """
    return {"text": text, "count": count, "maybe": maybe}


def add(a: int, b: int = 1) -> int:
    """Add two numbers.

    Args:
        a: The first number.
        b: The second number.
    """
    return a + b


RIGHT = dict(
    text="x",
    count=3,
    size=2.5,
    sure=True,
    names=["a"],
    table={"a": 1},
    way="up",
    either=1,
    pair=[1, "x"],
    shade="red",
)


def strict(schema):
    """Our schema as JSON Schema has it: `nullable` is not of that language."""
    if isinstance(schema, dict):
        plain = {key: strict(value) for key, value in schema.items() if key != "nullable"}
        return {"anyOf": [plain, {"type": "null"}]} if schema.get("nullable") else plain
    return [strict(value) for value in schema] if isinstance(schema, list) else schema


# --- schemas ---


@pytest.mark.parametrize("function", [add, everything])
def test_the_schema_is_transformers_without_what_is_returned(function):
    expected = get_json_schema(function)
    expected["function"].pop("return", None)
    assert schema_of(function) == expected == ToolBox([function]).schemas()[0]
    assert expected["function"]["parameters"]["required"] == (
        ["a"] if function is add else list(RIGHT)
    )


def unhinted(a):
    """Do.

    Args:
        a: It.
    """


def unsaid(a: int):
    """Do."""


def silent(a: int):
    return a


def many(*values: int):
    """Do."""


def open_ended(**values: int):
    """Do."""


def foreign(a: threading.Thread):
    """Do.

    Args:
        a: It.
    """


def unknown(a: "Nowhere"):  # noqa: F821
    """Do.

    Args:
        a: It.
    """


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (unhinted, "tool unhinted: .*a is missing a type hint.*Give every argument a type hint"),
        (unsaid, "tool unsaid: .*no description for the argument 'a'.*\"Args:\""),
        (silent, "tool silent: .*no docstring.*Write a docstring"),
        (many, r"tool many takes \*values: int. Give every"),
        (open_ended, r"tool open_ended takes \*\*values"),
        (foreign, "tool foreign: .*Thread.*type hint"),
        (unknown, "tool unknown: .*Nowhere.*type hint"),
    ],
)
def test_a_function_that_says_too_little_is_refused(function, message):
    for make in (tool, schema_of, lambda one: ToolBox([one])):
        with pytest.raises(ValueError, match=message):
            make(function)


def test_two_tools_of_one_name():
    box = ToolBox([add])
    with pytest.raises(ValueError, match=r"two tools called add\. Rename"):
        box.register(add)
    assert box.register(everything) is everything and list(box.tools) == ["add", "everything"]
    assert [schema["function"]["name"] for schema in box.schemas(["everything"])] == ["everything"]


# --- arguments ---

VALUES = [
    "x",
    "up",
    "red",
    "",
    0,
    1,
    3,
    -2,
    2.5,
    3.0,
    True,
    False,
    None,
    [],
    ["a"],
    [1],
    [1, "x"],
    ["x", 1],
    [1, "x", None],
    [1.5],
    {},
    {"a": 1},
    {"a": "b"},
    {"a": None},
    [[1]],
    1e300,
]


def test_each_value_fits_an_argument_just_where_jsonschema_says_so():
    properties, seen = schema_of(everything)["function"]["parameters"]["properties"], set()
    for name, schema in properties.items():
        for value in VALUES:
            fits = jsonschema.Draft202012Validator(strict(schema)).is_valid(value)
            assert (mismatch(value, schema, name) is None) == fits, (name, value)
            seen.add((name, fits))
    assert len(seen) == 2 * len(properties)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": "3"}, "count must be a whole number"),
        ({"count": True}, "count must be a whole number"),
        ({"size": None}, "size must be a number"),
        ({"way": "left"}, 'way must be one of: "up", "down", 1'),
        ({"names": ["a", 1]}, "each value of names must be a text"),
        ({"table": {"a": "b"}}, "each value of table must be a whole number"),
        ({"mixed": "x"}, "mixed must be a list or mixed must be true or false"),
        ({"either": []}, "a whole number or a text"),
    ],
)
def test_a_model_hears_what_is_wrong_with_its_arguments(changes, message):
    result = json.loads(ToolBox([everything]).run("everything", {**RIGHT, **changes}))
    assert list(result) == ["error"] and re.search(message, result["error"])


@pytest.mark.parametrize(
    ("name", "arguments", "error"),
    [
        ("subtract", {}, "there is no tool subtract"),
        ("add", {}, "add takes exactly: a; and may take: b"),
        ("add", {"a": 1, "c": 2}, "add takes exactly: a; and may take: b"),
        ("add", [1], "add takes exactly: a; and may take: b"),
        ("add", None, "add takes exactly: a; and may take: b"),
        ("\ud800", {}, "there is no tool ?"),
    ],
)
def test_a_call_that_cannot_be_made_is_an_error_of_its_own(name, arguments, error):
    box = ToolBox([add])
    assert json.loads(box.run(name, arguments)) == {"error": error}
    assert box.fault(name, arguments).replace("\ud800", "?") == error
    assert box.fault("add", {"a": 1}) is None and json.loads(box.run("add", {"a": 1})) == {
        "result": 2
    }


def test_the_arguments_arrive_and_objects_stay_as_they_are():
    assert json.loads(ToolBox([everything]).run("everything", RIGHT)) == {
        "text": "x",
        "count": 3,
        "maybe": None,
    }
    assert json.loads(ToolBox([everything]).run("everything", {**RIGHT, "maybe": 4}))["maybe"] == 4


# --- what tools may do ---


def with_body(body):
    """A tool without arguments that does this."""

    def it():
        """Do."""
        return body()

    return it


def endless():
    return endless()


def raises(error):
    raise error


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (lambda: raises(ValueError("no such day")), "no such day"),
        (lambda: 1 / 0, "ZeroDivisionError: division by zero"),
        (lambda: raises(SystemExit(3)), "SystemExit: 3"),
        (endless, "RecursionError: "),
        (lambda: raises(ValueError("\ud800")), r"^\?$"),
        (object, "TypeError: Object of type object is not JSON serializable"),
        (lambda: float("nan"), "Out of range float"),
        (lambda: "\ud800", "UnicodeEncodeError: "),
        (lambda: "x" * 5000, "it has answered with 5014 characters, at most 4000"),
        (lambda: raises(ValueError("x" * 9999)), "^x{500}$"),
    ],
)
def test_whatever_a_tool_does_there_is_a_result(body, error):
    result = json.loads(ToolBox([with_body(body)]).run("it", {}))
    assert list(result) == ["error"] and re.search(error, result["error"])


@pytest.mark.parametrize(
    ("body", "result"),
    [
        (lambda: {"a": 1}, {"a": 1}),
        (lambda: None, {"result": None}),
        (lambda: [1, "你"], {"result": [1, "你"]}),
        (lambda: "text", {"result": "text"}),
    ],
)
def test_results_are_objects(body, result):
    text = ToolBox([with_body(body)]).run("it", {})
    assert json.loads(text) == result and "\\u" not in text


def test_a_slow_tool_is_not_waited_for():
    ends = threading.Event()
    box = ToolBox([with_body(ends.wait)], seconds=0.05)
    start = time.monotonic()
    assert json.loads(box.run("it", {})) == {"error": "it has not answered within 0.05 seconds"}
    assert time.monotonic() - start < 5
    ends.set()


# --- the user's file ---

HEAD = "from __future__ import annotations\nfrom dataset.chat.tools import tool\n"
DOUBLE = '''
@tool
def double(number: int) -> int:
    """Double a number.

    Args:
        number: Any number.
    """
    return 2 * number

again = double

def not_a_tool():
    return 1
'''


def test_a_file_of_tools(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(HEAD + DOUBLE)
    for _ in range(2):  # twice is no clash
        box = load_tools(path)
        assert list(box.tools) == ["double"] and json.loads(box.run("double", {"number": 4})) == {
            "result": 8
        }
        assert box.schemas()[0]["function"]["parameters"]["properties"]["number"] == {
            "type": "integer",
            "description": "Any number.",
        }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "mine.py is no Python file"),
        (HEAD, "mine.py has no tools. Put `from dataset.chat.tools import tool`"),
        ("x = 1\nx =\n", r"mine.py: SyntaxError: .*line 2"),
        ("x = 1\nx / 0\n", r"mine.py:2: ZeroDivisionError"),
        ("import no_such_module\n", "mine.py:1: ModuleNotFoundError.*no_such_module"),
        (
            HEAD + "@tool\ndef f(a):\n    '''Do.\n\n    Args:\n        a: It.\n    '''\n",
            "mine.py:3: ValueError: tool f: .*type hint",
        ),
        ("raise SystemExit(1)\n", "mine.py:1: SystemExit"),
    ],
)
def test_a_file_without_tools_or_with_a_mistake_is_named(text, message, tmp_path):
    if text is not None:
        (tmp_path / "mine.py").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_tools(tmp_path / "mine.py")


# --- the toy world's ---


def test_the_toy_tools_are_tools_like_any_other():
    assert list(TOY_TOOLS.tools) == list(SCHEMAS)
    for schema in TOY_TOOLS.schemas():
        assert (
            jsonschema.Draft202012Validator.check_schema(schema["function"]["parameters"]) is None
        )
    assert (
        TOY_TOOLS.fault("convert_unit", {"value": "3", "from": "hours", "to": "minutes"})
        == "value must be a number"
    )
    assert (
        run_tool("get_time", {"city": "x", "zone": 1})
        == '{"error": "get_time takes exactly: city"}'
    )


@pytest.mark.parametrize(
    "expression",
    [
        "9**9**9",
        "1<<99999",
        "*".join(["1e308"] * 33),
        "1e999999999",
        "(" * 150,
        "１２ + １",
        "٣ + 1",
        "²",
        "x.y",
        "().__class__",
        "abs(1)",
        "1j",
        "1\x00",
        "\ud800",
        "1 < 2",
        "f'{1}'",
        "not 1",
        "~1",
        "1_0 if 1 else 2",
        "\n",
        "[].append(1)",
    ],
)
def test_the_calculator_refuses_quickly(expression):
    start = time.monotonic()
    assert list(json.loads(run_tool("calculator", {"expression": expression}))) == ["error"]
    assert time.monotonic() - start < 1


def test_many_calls_at_once():
    box, results = ToolBox([add]), []

    def ask(i):
        results.append((i, box.run("add", {"a": i, "b": i})))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [(i, f'{{"result": {2 * i}}}') for i in range(20)]

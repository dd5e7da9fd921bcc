"""Tools that a model may call: Python functions with their JSON schemas, and their results as JSON.

    from dataset.chat.tools import tool

    @tool
    def add(a: int, b: int = 1) -> int:
        \"\"\"Add two numbers.

        Args:
            a: The first number.
            b: The second number.
        \"\"\"
        return a + b

Put this into a file and give it to `load_tools`, or to a script that takes `--tools FILE`. The
schema comes from the type hints (str, int, float, bool, list, dict, Optional, Literal) and the
docstring; arguments with a default may be left out.

Whatever a model writes as a call, `ToolBox.run` answers with JSON: the function's result, or
{"error": ...}.
"""

import importlib.util
import inspect
import json
import sys
import threading
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

EVERYDAY_TOOLS = Path(__file__).with_name("everyday_tools.py")
NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
KINDS = {"string": str, "boolean": bool, "array": list, "object": dict, "null": type(None)}
WORDS = {
    "string": "a text",
    "boolean": "true or false",
    "array": "a list",
    "object": "an object",
    "null": "null",
    "integer": "a whole number",
    "number": "a number",
}


@dataclass(frozen=True, eq=False)
class Tool:
    """A function, called with its arguments by name, and its schema as chat templates expect it:
    {"type": "function", "function": {"name", "description", "parameters"}}."""

    schema: dict
    function: Callable

    @property
    def name(self) -> str:
        return self.schema["function"]["name"]


def tool(function: Callable) -> Callable:
    """Mark a function as a tool, for `load_tools` and `ToolBox`. ValueError without hints, text."""
    function.tool = Tool(schema_of(function), function)
    return function


def schema_of(function: Callable) -> dict:
    """The schema of a function, from its type hints and its docstring with an "Args:" part."""
    # seconds: not where no schema of a function is needed
    from transformers.utils import (
        DocstringParsingException,
        TypeHintParsingException,
        get_json_schema,
    )

    name = getattr(function, "__name__", repr(function))
    try:
        for parameter in inspect.signature(function).parameters.values():
            if parameter.kind not in NAMED:
                raise ValueError(
                    f"tool {name} takes {parameter}. Give every argument a name of its own."
                )
        schema = get_json_schema(function)
    except DocstringParsingException as error:
        raise ValueError(
            f"tool {name}: {error}. Write a docstring that describes the tool, then a line "
            '"Args:", and below it "argument: its meaning" for every argument.'
        ) from error
    except (TypeHintParsingException, NameError, TypeError) as error:
        raise ValueError(
            f"tool {name}: {error}. Give every argument a type hint: str, int, float, bool, list, "
            "dict, Optional or Literal."
        ) from error
    schema["function"].pop("return", None)  # it would cost tokens in every prompt
    return schema


class ToolBox:
    """Tools by their names. seconds: limit of a call, None: no limit; max_chars: longest result."""

    def __init__(
        self,
        tools: Iterable[Callable | Tool] = (),
        seconds: float | None = 10.0,
        max_chars: int = 4000,
    ):
        self.tools: dict[str, Tool] = {}
        self.seconds, self.max_chars = seconds, max_chars
        for one in tools:
            self.register(one)

    def register(self, function: Callable | Tool) -> Callable | Tool:
        """Add a function or a Tool, also as a decorator. ValueError if the name is taken."""
        made = function if isinstance(function, Tool) else getattr(function, "tool", None)
        made = made or Tool(schema_of(function), function)
        if made.name in self.tools:
            raise ValueError(f"there are two tools called {made.name}. Rename one of them.")
        self.tools[made.name] = made
        return function

    def schemas(self, names: Iterable[str] | None = None) -> list[dict]:
        """The schemas of all tools, or of those named."""
        return [self.tools[name].schema for name in (self.tools if names is None else names)]

    def fault(self, name: str, arguments: dict) -> str | None:
        """Why a call cannot be made, as a message to the model; None if it can."""
        if name not in self.tools:
            return f"there is no tool {name}"
        parameters = self.tools[name].schema["function"]["parameters"]
        known, required = parameters["properties"], parameters.get("required", [])
        if not isinstance(arguments, dict) or not set(required) <= set(arguments) <= set(known):
            optional = [key for key in known if key not in required]
            more = f"; and may take: {', '.join(optional)}" if optional else ""
            return f"{name} takes exactly: {', '.join(required)}{more}"
        faults = (mismatch(value, known[key], key) for key, value in arguments.items())
        return next(filter(None, faults), None)

    def run(self, name: str, arguments: dict) -> str:
        """A call's result as JSON: the object returned, else {"result": ...} or {"error": ...}."""
        if fault := self.fault(name, arguments):
            return error_json(fault)
        function, texts = self.tools[name].function, []
        worker = threading.Thread(
            target=lambda: texts.append(_call(function, arguments)), daemon=True
        )
        if self.seconds is None:
            worker.run()
        else:
            worker.start()
            worker.join(self.seconds)
        if not texts:  # Python cannot end a thread: it runs on, but nobody waits for it any more
            return error_json(f"{name} has not answered within {self.seconds:g} seconds")
        if len(texts[0]) > self.max_chars:
            return error_json(
                f"{name} has answered with {len(texts[0])} characters, at most {self.max_chars} "
                "are allowed"
            )
        return texts[0]


def _call(function: Callable, arguments: dict) -> str:
    """The function's result, or its error, as JSON."""
    try:
        result = function(**arguments)
        result = result if isinstance(result, dict) else {"result": result}
        text = json.dumps(result, ensure_ascii=False, allow_nan=False)
        text.encode()
        return text
    except (Exception, SystemExit) as error:  # a tool may do anything, the conversation continues
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        return error_json(f"{kind}{error}")


def error_json(text: str) -> str:
    """An error as the result of a call."""
    return json.dumps({"error": text[:500].encode(errors="replace").decode()}, ensure_ascii=False)


def mismatch(value: Any, schema: dict, name: str) -> str | None:
    """How a JSON value differs from the schema of an argument, in words; None if it does not.

    Knows the output of `get_json_schema`: type (one or several), nullable, enum, anyOf, items,
    prefixItems and additionalProperties; passes over the rest.
    """
    if value is None and schema.get("nullable"):
        return None
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(_is_a(kind, value) for kind in kinds):
        return f"{name} must be {' or '.join(WORDS.get(kind, kind) for kind in kinds)}"
    if "enum" in schema and not any(
        one == value and isinstance(one, bool) == isinstance(value, bool) for one in schema["enum"]
    ):
        values = ", ".join(json.dumps(one, ensure_ascii=False) for one in schema["enum"])
        return f"{name} must be one of: {values}"
    if "anyOf" in schema and all(mismatch(value, one, name) for one in schema["anyOf"]):
        return " or ".join(mismatch(value, one, name) for one in schema["anyOf"])
    parts = []
    if isinstance(value, list):
        first, rest = schema.get("prefixItems", []), schema.get("items", {})
        parts = [*zip(value, first), *((one, rest) for one in value[len(first) :])]
    elif isinstance(value, dict):
        parts = [(one, schema.get("additionalProperties", {})) for one in value.values()]
    faults = (mismatch(one, inner, f"each value of {name}") for one, inner in parts)
    return next(filter(None, faults), None)


def _is_a(kind: str, value: Any) -> bool:
    """Whether a JSON value is of a JSON type; a kind that JSON does not have fits everything."""
    if kind in ("integer", "number"):
        is_right_float = type(value) is float and (kind == "number" or value.is_integer())
        return type(value) is int or is_right_float
    return isinstance(value, KINDS.get(kind, object))


def load_tools(path: str | Path) -> ToolBox:
    """Run a Python file of the user's and collect the functions in it that are marked with `@tool`.

    ValueError if there are none, or if the file cannot be run.
    """
    module = run_file(path, "functions that are marked with @tool", "the tools")
    marked = [getattr(value, "tool", None) for value in vars(module).values()]
    marked = [one for one in marked if isinstance(one, Tool)]
    if not marked:
        raise ValueError(
            f"{path} has no tools. Put `from dataset.chat.tools import tool` at its head and @tool "
            "above each function."
        )
    return ToolBox(dict.fromkeys(marked))


def everyday_tools(names: Iterable[str]) -> list[Tool]:
    """The tools of everyday_tools.py with these names; [] unless it has all of them."""
    known, wanted = load_tools(EVERYDAY_TOOLS).tools, list(names)
    return [known[name] for name in wanted] if known.keys() >= set(wanted) else []


def run_file(path: str | Path, content: str, purpose: str) -> ModuleType:
    """Run a Python file of the user's, which should hold `content` for `purpose`: its module.

    ValueError if it cannot be run.
    """
    path = Path(path)
    if path.suffix != ".py" or not path.is_file():
        raise ValueError(f"{path} is no Python file. Give a .py file with {content}.")
    spec = importlib.util.spec_from_file_location(f"tools_in_{path.stem}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"{where(path, error)}: {type(error).__name__}: {error}. Put that right; then "
            f"{purpose} can be loaded."
        ) from error
    return module


def where(path: str | Path, error: BaseException) -> str:
    """ "path:line" of the file's last line in an error's traceback; else the path alone."""
    whole = Path(path).absolute()  # as importlib makes it
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename) == whole
    ]
    return f"{path}:{lines[-1]}" if lines else str(path)  # a SyntaxError says the line itself

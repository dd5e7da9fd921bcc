"""The tools of the toy world: their schemas, how they run, and the exercises that call them.

`run_tool` is deterministic, so that every call has one checkable result: weather, clock and prices
are functions of the name that is asked for. Nothing here evaluates text as Python; the calculator
walks a syntax tree of numbers and the four operations.
"""

import hashlib
import json
import random
import re
from datetime import date, timedelta
from fractions import Fraction

from dataset.chat.arithmetic import calculate
from dataset.chat.tools import Tool, ToolBox
from dataset.toy.core import Call, Item, Level, Turn, op_key, pairs
from dataset.toy.facts import COLOURS, NAME_MIDDLES, NAME_STARTS, compound
from dataset.toy.measures import UNITS

CITIES = compound(NAME_STARTS, NAME_MIDDLES, pairs("port field bridge wood", "港 原 桥 林"))
GOODS = pairs("lamp cup hat ball chair book boat bag", "灯 杯子 帽子 球 椅子 书 船 包")
FACTORS = {(big[0], small[0]): factor for big, small, factor, _ in UNITS}
SCHEMAS = {
    "calculator": ("Work out an arithmetic expression.", {"expression": "string"}),
    "get_time": ("Get the local time of a city.", {"city": "string"}),
    "get_weather": ("Get the weather of a city.", {"city": "string"}),
    "convert_unit": (
        "Convert a value between units.",
        {"value": "number", "from": "string", "to": "string"},
    ),
    "get_price": ("Get the price of an item.", {"item": "string"}),
    "days_between": ("Count the days between two dates.", {"start": "string", "end": "string"}),
    "count_letter": ("Count a letter in a word.", {"word": "string", "letter": "string"}),
}
ASK = {
    "calculator": {
        "en": ("Use the calculator: what is {x}?", "Please work out {x}."),
        "zh": ("用计算器算一下 {x} 等于多少。", "请算出 {x}。"),
    },
    "get_time": {
        "en": ("What time is it in {x}?", "Tell me the time in {x}."),
        "zh": ("{x}现在几点？", "告诉我{x}的时间。"),
    },
    "get_weather": {
        "en": ("How warm is it in {x}?", "What is the weather in {x}?"),
        "zh": ("{x}现在多少度？", "{x}的天气怎么样？"),
    },
    "convert_unit": {
        "en": ("Convert {n} {a} to {b} with the tool.", "Let the tool change {n} {a} into {b}."),
        "zh": ("{n} {a}等于多少{b}？请用工具换算。", "请用工具算算 {n} {a}是多少{b}。"),
    },
    "get_price": {
        "en": ("How much does the {x} cost?", "What is the price of the {x}?"),
        "zh": ("{x}多少钱？", "{x}的价格是多少？"),
    },
    "days_between": {
        "en": ("How many days are there from {a} to {b}?", "Count the days between {a} and {b}."),
        "zh": ("从 {a} 到 {b} 有多少天？", "{a} 和 {b} 之间隔了几天？"),
    },
    "count_letter": {
        "en": ('How many times is the letter "{a}" in "{x}"?', 'Count the letter "{a}" in "{x}".'),
        "zh": ("“{x}”里有几个字母“{a}”？", "数一数“{x}”中字母“{a}”的个数。"),
    },
}
TELL = {
    "calculator": {"en": "{x} = {r}.", "zh": "{x} = {r}。"},
    "get_time": {"en": "It is {r} in {x}.", "zh": "{x}现在是 {r}。"},
    "get_weather": {"en": "In {x} it is {r} degrees.", "zh": "{x}现在 {r} 度。"},
    "convert_unit": {"en": "{n} {a} is {r} {b}.", "zh": "{n} {a}等于 {r} {b}。"},
    "get_price": {"en": "The {x} costs {r} coins.", "zh": "{x}的价格是 {r} 元。"},
    "days_between": {"en": "From {a} to {b} it is {r} days.", "zh": "从 {a} 到 {b} 有 {r} 天。"},
    "count_letter": {
        "en": 'The number of "{a}" in "{x}" is {r}.',
        "zh": "“{x}”里“{a}”的个数是 {r}。",
    },
}
TWO_CITIES = {
    "en": ("How warm is it in {x} and in {y}?", "In {x} and {y} it is {r} and {s} degrees."),
    "zh": ("{x}和{y}各多少度？", "{x}和{y}现在分别是 {r} 度和 {s} 度。"),
}


def oracle(text: str, size: int) -> int:
    """A fixed number below `size` for every text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % size


def city_name(city: str) -> str:
    """The English name of a city known under either name, else the name itself."""
    return next((en for en, zh in CITIES if city in (en, zh)), city)


def convert(arguments: dict) -> int | float:
    """Convert between the units of `UNITS`, in either direction; ValueError for unknown pairs."""
    names = {name: unit[0] for big, small, *_ in UNITS for unit in (big, small) for name in unit}
    pair = (names.get(arguments["from"]), names.get(arguments["to"]))
    # 1e999999999 would keep the machine busy
    if not re.fullmatch(r"-?\d{1,15}(\.\d{1,15})?", str(arguments["value"])):
        raise ValueError(
            f"{arguments['value']!r} is not a number with at most 15 digits before and after the "
            "point"
        )
    value = Fraction(str(arguments["value"]))
    if pair in FACTORS:
        value *= FACTORS[pair]
    elif pair[::-1] in FACTORS:
        value /= FACTORS[pair[::-1]]
    else:
        raise ValueError(f"cannot convert {arguments['from']} to {arguments['to']}")
    return rounded(value)


def rounded(value: Fraction) -> int | float:
    """A whole number, or a float of at most six decimals. OverflowError if no float holds it."""
    return int(value) if value.denominator == 1 else float(round(value, 6))


def run_one(name: str, arguments: dict) -> dict:
    """The result of a call whose arguments are complete."""
    if name == "calculator":
        return {"result": rounded(calculate(arguments["expression"]))}
    if name == "get_weather":
        return {"temperature": oracle("weather" + city_name(arguments["city"]), 40)}
    if name == "get_time":
        minutes = oracle("time" + city_name(arguments["city"]), 24 * 60)
        return {"time": f"{minutes // 60:02d}:{minutes % 60:02d}"}
    if name == "convert_unit":
        return {"result": convert(arguments)}
    if name == "get_price":
        return {"price": 1 + oracle("price" + arguments["item"], 99)}
    if name == "days_between":
        start, end = (date.fromisoformat(arguments[key]) for key in ("start", "end"))
        return {"days": (end - start).days}
    return {"count": arguments["word"].lower().count(arguments["letter"].lower())}


def toy_tool(name: str) -> Tool:
    """A tool of the toy world as one of the registry's."""
    description, arguments = SCHEMAS[name]
    properties = {key: {"type": kind} for key, kind in arguments.items()}
    parameters = {"type": "object", "properties": properties, "required": list(arguments)}
    schema = {
        "type": "function",
        "function": {"name": name, "description": description, "parameters": parameters},
    }
    return Tool(schema, lambda **arguments: run_one(name, arguments))


TOY_TOOLS = ToolBox(map(toy_tool, SCHEMAS), seconds=None)  # each of them ends soon by itself
tool_schemas, run_tool = TOY_TOOLS.schemas, TOY_TOOLS.run


def draw_expression(rng: random.Random) -> tuple[str, tuple[str, ...]]:
    """A product of two-digit or a sum or difference of three-digit numbers, with its key."""
    op = rng.choice("*+-")
    low, high = (12, 99) if op == "*" else (101, 999)
    a, b = rng.randint(low, high), rng.randint(low, high)
    a, b = (max(a, b), min(a, b)) if op == "-" else (a, b)
    return f"{a} {op} {b}", op_key(a, op.replace("*", "×"), b)


def draw_call(rng: random.Random, name: str, side: bool) -> tuple[dict, dict, tuple[str, ...]]:
    """Arguments of one call, the fields for its sentences, and its keys."""
    if name == "calculator":
        expression, keys = draw_expression(rng)
        return {"expression": expression}, {"x": expression}, keys
    if name in ("get_time", "get_weather"):
        city = rng.choice(CITIES)
        return {"city": city[side]}, {"x": city[side]}, (f"city:{city[0]}",)
    if name == "convert_unit":
        big, small, _, _ = rng.choice([unit for unit in UNITS if unit[3]])
        n = rng.randint(2, 99)
        fields = {"n": n, "a": big[side], "b": small[side]}
        arguments = {"value": n, "from": big[side], "to": small[side]}
        return arguments, fields, (f"unit:{big[0]}>{small[0]}:{n}",)
    if name == "get_price":
        colour, thing = rng.choice(COLOURS), rng.choice(GOODS)
        item = f"{colour[1]}{thing[1]}" if side else f"{colour[0]} {thing[0]}"
        return {"item": item}, {"x": item}, (f"item:{colour[0]} {thing[0]}",)
    if name == "days_between":
        start = date(2026, 1, 1) + timedelta(rng.randrange(300))
        end = start + timedelta(rng.randint(2, 99))
        fields = {"a": start.isoformat(), "b": end.isoformat()}
        return {"start": fields["a"], "end": fields["b"]}, fields, (f"span:{start}/{end}",)
    word = rng.choice(CITIES)[0].lower()
    letter = rng.choice(word)
    keys = (f"letter:{word}/{letter}", f"city:{word.title()}")
    return {"word": word, "letter": letter}, {"x": word, "a": letter}, keys


def result_of(call: Call) -> str:
    """The one value that a call returns, as text."""
    result = json.loads(run_tool(call.name, call.arguments))
    assert "error" not in result, f"{call}: {result}"
    return str(next(iter(result.values())))


def offer(rng: random.Random, name: str, level: Level) -> tuple[str, ...]:
    """The tools shown with a question: the right one among others, in any order."""
    others = rng.sample(
        [tool for tool in level.tools if tool != name], rng.randrange(level.offered_tools)
    )
    shown = [name, *others]
    rng.shuffle(shown)
    return tuple(shown)


def two_cities(rng: random.Random, language: str, level: Level) -> Item:
    """Two calls at once; the answer lists both results."""
    side = language == "zh"
    cities = rng.sample(CITIES, 2)
    calls = tuple(Call("get_weather", {"city": city[side]}) for city in cities)
    results = [result_of(call) for call in calls]
    fields = {"x": cities[0][side], "y": cities[1][side], "r": results[0], "s": results[1]}
    question_text, reply_text = TWO_CITIES[language]
    question, reply = question_text.format(**fields), reply_text.format(**fields)
    return Item(
        "tools",
        language,
        tuple(f"city:{city[0]}" for city in cities),
        (Turn(question, reply, calls),),
        ", ".join(results),
        tools=offer(rng, "get_weather", level),
        wrong=reply_text.format(**fields | {"r": results[1], "s": int(results[0]) + 1}),
    )


def tool_use(rng: random.Random, language: str, level: Level) -> Item:
    """A question that needs a tool; held out are its arguments (numbers, cities, dates, items)."""
    if level.name == "full" and rng.random() < 0.1:
        return two_cities(rng, language, level)
    name, side = rng.choice(level.tools), language == "zh"
    arguments, fields, keys = draw_call(rng, name, side)
    call = Call(name, arguments)
    answer = result_of(call)
    reply = TELL[name][language].format(r=answer, **fields)
    if ":" in answer:
        false = f"{(int(answer[:2]) + 1) % 24:02d}{answer[2:]}"
    else:
        false = str(int(answer) + 1)
    question = rng.choice(ASK[name][language]).format(**fields)
    called = f"{json.dumps(arguments, ensure_ascii=False)} {run_tool(name, arguments)}"
    return Item(
        "tools",
        language,
        keys,
        (Turn(question, reply, (call,)),),
        answer,
        prose=f"{question} {called} {reply}",
        wrong=TELL[name][language].format(r=false, **fields),
        tools=offer(rng, name, level),
    )

"""The everyday tools: right values, the shape of their results, and errors instead of guesses."""

import json
from pathlib import Path

import pytest

from dataset.chat.tools import load_tools

PATH = Path(__file__).resolve().parents[3] / "dataset" / "chat" / "everyday_tools.py"


@pytest.fixture(scope="module")
def box():
    return load_tools(PATH)


@pytest.fixture
def run(box):
    return lambda name, **arguments: json.loads(box.run(name, arguments))


def test_names_and_arguments(box):
    """They are the ones that public rows call."""
    found = {
        name: list(one.schema["function"]["parameters"]["properties"])
        for name, one in box.tools.items()
    }
    assert found == {
        "calculate_math": ["expression"],
        "unit_converter": ["value", "from_unit", "to_unit"],
        "get_current_weather": ["location", "unit"],
        "get_current_time": ["timezone"],
        "get_exchange_rate": ["from_currency", "to_currency"],
        "translate_text": ["text", "target_language"],
        "random_number": ["min", "max"],
        "text_length": ["text"],
    }


@pytest.mark.parametrize(
    "expression, result",
    [
        ("256 × 37", "9472"),
        ("2^10", "1024"),
        ("sqrt(144)", "12"),
        ("1/3", "0.3333333333333333"),
        ("0.1+0.2", "0.3"),
        ("（3−5）²", "4"),
    ],
)
def test_sums(run, expression, result):
    assert run("calculate_math", expression=expression) == {"result": result}


@pytest.mark.parametrize(
    "value, source, target, result",
    [
        (30, "celsius", "fahrenheit", 86),
        (-40, "Fahrenheit", "Celsius", -40),
        (0, "celsius", "kelvin", 273.15),
        (98.6, "华氏度", "摄氏度", 37),
        (100, "km", "miles", 62.1371),
        (1, "miles", "km", 1.6093),
        (1, "pounds", "kg", 0.4536),
        (70, "kg", "斤", 140),
        (10, "meters", "feet", 32.8084),
        (1, "inch", "cm", 2.54),
        (3, "公里", "米", 3000),
        (1, "mm", "km", 1e-6),
        (36, "km/h", "m/s", 10),
        (2, "hours", "minutes", 120),
        (1, "gallon", "liters", 3.7854),
    ],
)
def test_units(run, value, source, target, result):
    assert run("unit_converter", value=value, from_unit=source, to_unit=target) == {
        "result": result
    }


def test_one_moment_in_every_timezone(run):
    times = {
        "Asia/Shanghai": "14:30",
        "America/New_York": "01:30",
        "Europe/London": "06:30",
        "Asia/Tokyo": "15:30",
        "Europe/Paris": "07:30",
        "Australia/Sydney": "17:30",
    }
    for name, hour in times.items():
        expected = {"datetime": f"2025-03-07 {hour}:00", "timezone": name}
        assert run("get_current_time", timezone=name) == expected
    assert run("get_current_time")["timezone"] == "Asia/Shanghai"


def test_tables(run):
    beijing = {"city": "北京", "temperature": "28°C", "humidity": "65%", "condition": "晴"}
    assert run("get_current_weather", location="北京") == beijing
    assert (
        run("get_current_weather", location="Beijing", unit="fahrenheit")["temperature"] == "82°F"
    )
    assert run("get_exchange_rate", from_currency="usd", to_currency="CNY") == {
        "from": "usd",
        "to": "CNY",
        "rate": 7.21,
    }
    assert run("get_exchange_rate", from_currency="CNY", to_currency="USD")["rate"] == 0.1387
    assert run("get_exchange_rate", from_currency="EUR", to_currency="EUR")["rate"] == 1
    for text, language, translated in (
        ("你好世界", "english", "Hello World"),
        ("Good morning!", "chinese", "早上好"),
        ("生日快乐", "英文", "Happy birthday"),
    ):
        assert run("translate_text", text=text, target_language=language) == {
            "translated_text": translated
        }


def test_equal_arguments_give_equal_numbers(run):
    drawn = [run("random_number", min=1, max=1000)["result"] for _ in range(3)]
    assert len(set(drawn)) == 1 and 1 <= drawn[0] <= 1000
    assert 0 <= run("random_number")["result"] <= 100
    assert run("text_length", text="one two") == {"characters": 7, "words": 2}


@pytest.mark.parametrize(
    "name, arguments, message",
    [
        ("get_current_weather", {"location": "Atlantis"}, "unknown city 'Atlantis'"),
        (
            "get_exchange_rate",
            {"from_currency": "USD", "to_currency": "XYZ"},
            "unknown rate USD/XYZ",
        ),
        ("get_exchange_rate", {"from_currency": "X", "to_currency": "X"}, "unknown rate X/X"),
        ("translate_text", {"text": "猫", "target_language": "english"}, "no translation"),
        (
            "translate_text",
            {"text": "猫", "target_language": "elvish"},
            "unknown language 'elvish'",
        ),
        ("unit_converter", {"value": 1, "from_unit": "km", "to_unit": "kg"}, "unit of length"),
        ("unit_converter", {"value": 1, "from_unit": "li", "to_unit": "kg"}, "unknown unit 'li'"),
        ("unit_converter", {"value": "1", "from_unit": "km", "to_unit": "m"}, "must be a number"),
        ("get_current_time", {"timezone": "Mars/Base"}, "unknown timezone 'Mars/Base'"),
        ("get_current_time", {"timezone": "../etc/passwd"}, "unknown timezone"),
        ("get_current_time", {"timezone": "Asia"}, "unknown timezone"),
        ("random_number", {"min": 5, "max": 1}, "min 5 is above max 1"),
        ("calculate_math", {"expression": "9**9**9"}, "too large"),
        ("calculate_math", {"expression": "1/0"}, "cannot work out"),
    ],
)
def test_an_error_rather_than_a_guess(run, name, arguments, message):
    assert message in run(name, **arguments)["error"]

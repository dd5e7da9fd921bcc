"""Everyday tools, under the names that the minimind tutorials and their agent_rl*.jsonl have.

    python trainer/train_agent.py --data_path agent_rl.jsonl --tools dataset/chat/everyday_tools.py
    python scripts/chat_api.py --tools dataset/chat/everyday_tools.py

Sums and units are worked out. The rest is for practice, not for news: each result depends on the
arguments alone, so that a run of reinforcement learning can be repeated and resumed exactly, and no
network is needed. The clock stands still at NOW, in every timezone; weather, exchange rates and
translations are the fixed values below, and anything else is an error, never a guess.
"""

import random
from datetime import datetime, timezone
from fractions import Fraction
from typing import Literal
from zoneinfo import ZoneInfo

from dataset.chat.arithmetic import calculate
from dataset.chat.tools import tool

NOW = datetime(2025, 3, 7, 6, 30, tzinfo=timezone.utc)  # 14:30 in Shanghai

HUMIDITY = "65%"
WEATHER = (  # degrees Celsius, sky, names of the city
    (28, "晴", "北京", "beijing"),
    (15, "多云", "上海", "shanghai"),
    (32, "闷热", "广州", "guangzhou"),
    (30, "晴", "深圳", "shenzhen"),
    (22, "阴", "杭州", "hangzhou"),
    (18, "小雨", "成都", "chengdu"),
    (25, "多云", "武汉", "wuhan"),
    (20, "晴", "南京", "nanjing"),
    (16, "大风", "西安", "xi'an", "xian"),
    (26, "阴", "重庆", "chongqing"),
    (12, "晴", "东京", "tokyo"),
    (8, "多云", "纽约", "new york"),
    (5, "小雨", "伦敦", "london"),
    (10, "阴", "巴黎", "paris"),
    (25, "晴朗", "悉尼", "sydney"),
)
RATES = {  # units of the second currency for one of the first
    ("USD", "CNY"): 7.21,
    ("EUR", "CNY"): 7.85,
    ("GBP", "CNY"): 9.12,
    ("JPY", "CNY"): 0.048,
    ("CNY", "JPY"): 20.83,
    ("AUD", "CNY"): 4.72,
    ("USD", "EUR"): 0.92,
    ("USD", "GBP"): 0.79,
}
LANGUAGES = {
    "chinese": ("chinese", "zh", "中文", "汉语"),
    "english": ("english", "en", "英文", "英语"),
}
TRANSLATIONS = (  # Chinese, English
    ("你好世界", "Hello World"),
    ("早上好", "Good morning"),
    ("今天天气真好", "The weather is nice today"),
    ("我喜欢编程", "I love programming"),
    ("机器学习很有趣", "Machine learning is interesting"),
    ("生日快乐", "Happy birthday"),
)
UNITS = (  # kind, its size in base units, its zero in base units, names (PUBLISHED has the first)
    ("length", "1", "0", "meter meters metre metres m 米"),
    ("length", "1000", "0", "km kilometer kilometers kilometre kilometres 公里 千米"),
    ("length", "0.01", "0", "cm centimeter centimeters centimetre centimetres 厘米"),
    ("length", "0.001", "0", "mm millimeter millimeters millimetre millimetres 毫米"),
    ("length", "1609.344", "0", "mile miles mi 英里"),
    ("length", "0.3048", "0", "foot feet ft 英尺"),
    ("length", "0.0254", "0", "inch inches in 英寸"),
    ("length", "0.9144", "0", "yard yards yd 码"),
    ("weight", "1", "0", "kg kilogram kilograms 千克 公斤"),
    ("weight", "0.001", "0", "g gram grams 克"),
    ("weight", "0.000001", "0", "mg milligram milligrams 毫克"),
    ("weight", "1000", "0", "t ton tons tonne tonnes 吨"),
    ("weight", "0.5", "0", "jin 斤"),
    ("weight", "0.45359237", "0", "pound pounds lb lbs 磅"),
    ("weight", "0.028349523125", "0", "ounce ounces oz 盎司"),
    ("temperature", "1", "0", "kelvin k 开尔文"),
    ("temperature", "1", "273.15", "celsius c °c ℃ 摄氏度"),
    ("temperature", "5/9", "45967/180", "fahrenheit f °f ℉ 华氏度"),
    ("volume", "1", "0", "liter liters litre litres l 升"),
    ("volume", "0.001", "0", "ml milliliter milliliters millilitre millilitres 毫升"),
    ("volume", "3.785411784", "0", "gallon gallons gal 加仑"),
    ("area", "1", "0", "m2 sqm m² 平方米"),
    ("area", "10000", "0", "hectare hectares ha 公顷"),
    ("area", "4046.8564224", "0", "acre acres 英亩"),
    ("speed", "1", "0", "m/s mps 米每秒"),
    ("speed", "5/18", "0", "km/h kmh kph 公里每小时 千米每小时"),
    ("speed", "0.44704", "0", "mph 英里每小时"),
    ("time", "1", "0", "second seconds s sec 秒"),
    ("time", "60", "0", "minute minutes min 分钟"),
    ("time", "3600", "0", "hour hours h 小时"),
    ("time", "86400", "0", "day days d 天"),
)
# factors of six digits, with which the answers in public rows were made: exact ones would give them
# other last digits
PUBLISHED = {
    ("km", "mile"): "0.621371",
    ("mile", "km"): "1.60934",
    ("kg", "pound"): "2.20462",
    ("pound", "kg"): "0.453592",
    ("meter", "foot"): "3.28084",
}


@tool
def calculate_math(expression: str) -> dict:
    """Work out an arithmetic expression, with powers and square roots.

    Args:
        expression: The expression, such as 123+456, 2**10 or sqrt(144).
    """
    value = calculate(expression, powers=True)
    return {"result": str(value if value.denominator == 1 else float(value))}


@tool
def unit_converter(value: float, from_unit: str, to_unit: str) -> dict:
    """Convert a value between units of length, weight, temperature, volume, area, speed or time.

    Args:
        value: The number to convert.
        from_unit: Its unit, such as km, miles, kg, pounds, celsius or fahrenheit.
        to_unit: The unit to convert to.
    """
    source, target = find_unit(from_unit), find_unit(to_unit)
    if source[0] != target[0]:
        raise ValueError(f"{from_unit} is a unit of {source[0]}, {to_unit} one of {target[0]}")
    (_, factor, zero, name), (_, other_factor, other_zero, other_name) = source, target
    if published := PUBLISHED.get((name, other_name)):
        return {"result": shortened(Fraction(str(value)) * Fraction(published))}
    return {"result": shortened((Fraction(str(value)) * factor + zero - other_zero) / other_factor)}


def find_unit(name: str) -> tuple[str, Fraction, Fraction, str]:
    """(kind, size, zero, first name) of a row of UNITS. ValueError if there is none."""
    wanted = name.strip().lower()
    for kind, factor, zero, names in UNITS:
        if wanted in names.split():
            return kind, Fraction(factor), Fraction(zero), names.split()[0]
    raise ValueError(
        f"unknown unit {name!r}: give one of {', '.join(u[3].split()[0] for u in UNITS)}"
    )


def shortened(value: Fraction) -> int | float:
    """A whole number, or a float of four decimals; of four digits, if it is below 0.01."""
    if value.denominator == 1:
        return int(value)
    return (
        float(round(value, 4)) if abs(value) >= Fraction("0.01") else float(f"{float(value):.4g}")
    )


@tool
def get_current_weather(location: str, unit: Literal["celsius", "fahrenheit"] = "celsius") -> dict:
    """Get the current weather of a city: temperature, humidity and sky.

    Args:
        location: The city, such as 北京 or New York.
        unit: The unit of the temperature.
    """
    wanted = location.strip().removesuffix("市").lower()
    for degrees, sky, *names in WEATHER:
        if wanted in names:
            warm = f"{degrees}°C" if unit == "celsius" else f"{round(degrees * 9 / 5 + 32)}°F"
            result = {"city": location, "temperature": warm, "humidity": HUMIDITY}
            return {**result, "condition": sky}
    cities = ", ".join(names[0] for _, _, *names in WEATHER)
    raise ValueError(f"unknown city {location!r}: give one of {cities}")


@tool
def get_current_time(timezone: str = "Asia/Shanghai") -> dict:
    """Get the current date and time in a timezone.

    Args:
        timezone: Its name, such as Asia/Shanghai or America/New_York.
    """
    try:
        local = NOW.astimezone(ZoneInfo(timezone))
    except (KeyError, ValueError, OSError):
        raise ValueError(f"unknown timezone {timezone!r}: give one like Asia/Tokyo") from None
    return {"datetime": local.strftime("%Y-%m-%d %H:%M:%S"), "timezone": timezone}


@tool
def get_exchange_rate(from_currency: str, to_currency: str) -> dict:
    """Get the exchange rate between two currencies.

    Args:
        from_currency: Code of the first, such as USD.
        to_currency: Code of the second, such as CNY.
    """
    pair = (from_currency.strip().upper(), to_currency.strip().upper())
    known = {code for codes in RATES for code in codes}
    rate = 1.0 if pair[0] == pair[1] and pair[0] in known else RATES.get(pair)
    if rate is None and pair[::-1] in RATES:
        rate = float(f"{1 / RATES[pair[::-1]]:.4g}")
    if rate is None:
        pairs = ", ".join("/".join(codes) for codes in RATES)
        raise ValueError(f"unknown rate {'/'.join(pair)}: give one of {pairs}")
    return {"from": from_currency, "to": to_currency, "rate": rate}


@tool
def translate_text(text: str, target_language: str) -> dict:
    """Translate a text.

    Args:
        text: The text.
        target_language: The language to translate it to, such as english or chinese.
    """
    wanted = target_language.strip().lower()
    language = next((name for name, names in LANGUAGES.items() if wanted in names), None)
    if language is None:
        raise ValueError(
            f"unknown language {target_language!r}: give one of {', '.join(LANGUAGES)}"
        )
    plain = text.strip(" .!。！").lower()
    for chinese, english in TRANSLATIONS:
        if plain in (chinese, english.lower()):
            return {"translated_text": chinese if language == "chinese" else english}
    known = ", ".join(english for _, english in TRANSLATIONS)
    raise ValueError(f"no translation of {text!r} is known: give one of {known}, or their Chinese")


@tool
def random_number(min: int = 0, max: int = 100) -> dict:
    """Draw a random whole number from a range.

    Args:
        min: The smallest that may come.
        max: The largest that may come.
    """
    if min > max:
        raise ValueError(f"min {min} is above max {max}")
    return {"result": random.Random(f"{min}:{max}").randint(min, max)}


@tool
def text_length(text: str) -> dict:
    """Count the characters and the words of a text.

    Args:
        text: The text.
    """
    return {"characters": len(text), "words": len(text.split())}

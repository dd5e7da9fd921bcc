"""Arithmetic in text, worked out exactly without running it: numbers, brackets and the operations
alone; on request also powers and roots, of bounded size.
"""

import ast
import math
import operator
from collections.abc import Callable, Mapping
from fractions import Fraction

MAX_CHARS = 200  # of an expression
MAX_BITS = 4000  # of a power, about 1,200 digits: a larger one would keep the machine busy
OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
SIGNS = str.maketrans({"×": "*", "÷": "/", "−": "-"})
POWER_SIGNS = str.maketrans({"^": "**", "²": "**2", "³": "**3", "（": "(", "）": ")", "√": "sqrt"})
Operators = Mapping[type | str, Callable]


def calculate(expression: str, powers: bool = False) -> Fraction:
    """The value of an expression of at most 200 characters, also with the signs × ÷ and −.

    powers: with powers (** ^ ² ³), sqrt() and abs() too, and the brackets （ ）. An irrational root
    is its nearest float. ValueError if it cannot be worked out.
    """
    if not isinstance(expression, str) or len(expression) > MAX_CHARS:
        raise ValueError(f"the expression must be a text of at most {MAX_CHARS} characters")
    text = expression.translate(SIGNS).strip()
    if powers:
        text = text.translate(POWER_SIGNS).replace("math.sqrt", "sqrt")
    try:
        return evaluate(text, powers)
    except (SyntaxError, ZeroDivisionError, RecursionError, OverflowError) as error:
        raise ValueError(f"cannot work out {expression!r}: {error}") from error


def evaluate(expression: str, powers: bool = False) -> Fraction:
    """The exact value of an expression of numbers, + - * / // % and signs; powers: ** sqrt() abs().

    ValueError or SyntaxError for anything else; ZeroDivisionError, RecursionError, OverflowError.
    """
    known = OPERATORS | FUNCTIONS if powers else OPERATORS
    return _value(ast.parse(expression, mode="eval").body, known)


def _value(node: ast.AST, known: Operators) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return Fraction(str(node.value))
    if isinstance(node, ast.BinOp) and type(node.op) in known:
        left, right = _value(node.left, known), _value(node.right, known)
        return Fraction(known[type(node.op)](left, right))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.UAdd, ast.USub)):
        value = _value(node.operand, known)
        return value if isinstance(node.op, ast.UAdd) else -value
    if isinstance(node, ast.Call) and getattr(node.func, "id", None) in known:
        if len(node.args) == 1 and not node.keywords:
            return known[node.func.id](_value(node.args[0], known))
    also = " ** sqrt() abs()" if ast.Pow in known else ""
    raise ValueError(f"only numbers, brackets and + - * / // %{also} can be worked out")


def power(base: Fraction, exponent: Fraction) -> Fraction:
    """base ** exponent. ValueError for a root of a negative number, and above MAX_BITS."""
    if exponent.denominator != 1:
        if base < 0:
            raise ValueError(f"{base} has no root that is a number")
        return Fraction(float(base) ** float(exponent))
    size = max(base.numerator.bit_length(), base.denominator.bit_length())
    if abs(exponent) * size > MAX_BITS:
        raise ValueError(f"the power is too large: at most {MAX_BITS} bits are worked out")
    return base ** int(exponent)


def square_root(value: Fraction) -> Fraction:
    """The root, exact where it is a fraction, else the nearest float. ValueError below 0."""
    if value < 0:
        raise ValueError(f"{value} has no root that is a number")
    top, bottom = math.isqrt(value.numerator), math.isqrt(value.denominator)
    if (top * top, bottom * bottom) == (value.numerator, value.denominator):
        return Fraction(top, bottom)
    return Fraction(math.sqrt(value))


FUNCTIONS = {ast.Pow: power, "sqrt": square_root, "abs": abs}

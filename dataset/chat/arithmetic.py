"""Arithmetic in text, worked out exactly without running it: numbers, brackets and the operations
alone.
"""

import ast
import operator
from fractions import Fraction

OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


def evaluate(expression: str) -> Fraction:
    """The exact value of an expression of numbers, + - * / // % and signs.

    ValueError or SyntaxError for anything else; ZeroDivisionError, RecursionError, OverflowError.
    """
    return _value(ast.parse(expression, mode="eval").body)


def _value(node: ast.AST) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return Fraction(str(node.value))
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return Fraction(OPERATORS[type(node.op)](_value(node.left), _value(node.right)))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.UAdd, ast.USub)):
        return _value(node.operand) if isinstance(node.op, ast.UAdd) else -_value(node.operand)
    raise ValueError("only numbers, brackets and + - * / // % can be worked out")

"""A file of tools as a user may write it."""

from pathlib import Path

OWN_TOOLS = '''
from dataset.chat.tools import tool

@tool
def multiply(a: int, b: int) -> int:
    """Multiply two numbers.

    Args:
        a: The first number.
        b: The second number.
    """
    return a * b
'''


def write_tools(folder: Path) -> Path:
    """The path of a file of OWN_TOOLS."""
    path = folder / "mine.py"
    path.write_text(OWN_TOOLS)
    return path

"""A file of tools as a user may write it: OWN_TOOLS, and `write_tools(folder)` to have it on disk."""

OWN_TOOLS = '''
from dataset.tools import tool

@tool
def multiply(a: int, b: int) -> int:
    """Multiply two numbers.

    Args:
        a: The first number.
        b: The second number.
    """
    return a * b
'''


def write_tools(folder):
    """The path of the file."""
    path = folder / "mine.py"
    path.write_text(OWN_TOOLS)
    return path

"""The import that tool files use: `from dataset.tools import tool`; see dataset/chat/tools.py."""

from dataset.chat.tools import Tool, ToolBox, tool

__all__ = ["Tool", "ToolBox", "tool"]

"""The tools on offer: the toy world's, and those of the user's own file."""

from pathlib import Path

import streamlit as st

from dataset.tools import ToolBox, load_tools
from dataset.toy_tools import TOY_TOOLS


def get(args):
    """The ToolBox of --tools, read anew when the file has changed. ValueError if it cannot be read."""
    path = Path(args.tools)
    return _load(args.tools, path.stat().st_mtime_ns if path.is_file() else 0) if args.tools else TOY_TOOLS


@st.cache_resource(show_spinner=False)
def _load(path, stamp):
    return ToolBox([*TOY_TOOLS.tools.values(), *load_tools(path).tools.values()])

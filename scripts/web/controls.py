"""Controls that the pages share: the checkpoint, and the settings of its completions."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import streamlit as st

from dataset.chat.tools import ToolBox, load_tools
from dataset.toy.tools import TOY_TOOLS
from scripts.web import engines
from scripts.web.conversation import Settings
from scripts.web.run_folders import RunFolder, find_checkpoints
from scripts.web.text import t

SAMPLING = ("temperature", "top_p", "top_k", "max_tokens", "seed")  # fields of Settings
DEFAULTS = {name: getattr(Settings, name) for name in SAMPLING}
DEFAULTS |= {"thinking": "auto", "tools": [], "system": ""}
THINKING = {"auto": None, "on": True, "off": False}


def checkpoints_or_stop(args: Any) -> dict[str, RunFolder]:
    """{name: RunFolder} of all checkpoints; without any, the page says how to make one and ends."""
    runs = {run.name: run for run in find_checkpoints(args.save_dir)}
    if not runs:
        st.info(t("no_checkpoints", save_dir=args.save_dir), icon=":material/model_training:")
        st.code("bash scripts/quickstart.sh", language="bash")
        st.stop()
    return runs


def pick_checkpoint(
    runs: dict[str, RunFolder], key: str, label: str, args: Any, default: int = 0
) -> tuple[RunFolder, Path | None]:
    """A select box over the checkpoints; returns (RunFolder, base folder of an adapter or None)."""
    names = list(runs)
    if st.session_state.get(key) not in runs:
        st.session_state[key] = names[min(default, len(names) - 1)]
    labels = {name: caption(run) for name, run in runs.items()}
    name = st.selectbox(
        label,
        names,
        key=key,
        format_func=labels.get,
        help=t("checkpoint_help", save_dir=args.save_dir),
    )
    run = runs[name]
    if run.kind == "model" or run.base:
        return run, run.base
    models = [name for name, other in runs.items() if other.kind == "model"]
    base = st.selectbox(t("base"), models, key=f"{key}_base")
    return run, runs[base].path if base else None


def choose(key: str, options: Iterable[str]) -> None:
    """A row of buttons, one of which is pressed; key and options are names of texts."""
    labels = {option: t(option) for option in options}
    st.segmented_control(
        t(key), list(labels), key=key, format_func=labels.get, required=True, width="stretch"
    )


def caption(run: RunFolder) -> str:
    """The name of a checkpoint in a list."""
    if run.kind == "adapter":
        return t("is_adapter", name=run.name)
    return run.name if run.chats else t("is_completion", name=run.name)


def load_or_stop(run: RunFolder, base: Path | None, args: Any) -> engines.Loaded:
    """The Loaded checkpoint; if it cannot be read, the page says why and ends."""
    try:
        with st.spinner(t("loading")):
            if run.kind == "adapter" and base is None:
                raise ValueError(t("no_base"))
            return engines.get(run, base, args)
    except (ValueError, OSError) as error:
        st.error(t("cannot_load", name=run.name, error=error), icon=":material/error:")
        st.stop()


def find_tools(args: Any) -> ToolBox:
    """The toy world's tools and those of --tools, read anew when that file has changed. ValueError
    if it cannot be read.
    """
    path = Path(args.tools)
    stamp = path.stat().st_mtime_ns if path.is_file() else 0
    return _load_tools(args.tools, stamp) if args.tools else TOY_TOOLS


@st.cache_resource(show_spinner=False)
def _load_tools(path: str, stamp: int) -> ToolBox:
    return ToolBox([*TOY_TOOLS.tools.values(), *load_tools(path).tools.values()])


def completion_settings(args: Any) -> Settings:
    """Draw the controls of a completion; returns Settings."""
    try:
        box = find_tools(args)
    except ValueError as error:
        st.error(error, icon=":material/error:")
        box = TOY_TOOLS
    for key, value in DEFAULTS.items():
        st.session_state.setdefault(key, value)
    st.session_state.tools = [name for name in st.session_state.tools if name in box.tools]
    choose("thinking", THINKING)
    st.multiselect(
        t("tools"), list(box.tools), key="tools", placeholder=t("tools_none"), help=t("tools_help")
    )
    st.text_area(t("system"), key="system", height=80)
    with st.expander(t("sampling"), icon=":material/tune:"):
        st.slider(
            t("temperature"), 0.0, 2.0, step=0.05, key="temperature", help=t("temperature_help")
        )
        st.slider(t("top_p"), 0.05, 1.0, step=0.05, key="top_p", help=t("top_p_help"))
        st.number_input(t("top_k"), 0, 1000, step=10, key="top_k", help=t("top_k_help"))
        st.number_input(t("max_tokens"), 1, 4096, step=64, key="max_tokens")
        st.number_input(
            t("seed"), 0, 2**31, step=1, key="seed", placeholder=t("random"), help=t("seed_help")
        )
    state = st.session_state
    return Settings(
        **{name: state[name] for name in SAMPLING},
        thinking=THINKING[state.thinking],
        tools=tuple(state.tools),
        box=box,
        system=state.system.strip(),
    )

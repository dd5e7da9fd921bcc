"""The page on which one talks to a checkpoint."""

from typing import Any

import streamlit as st

from scripts.web import controls, drawing
from scripts.web.conversation import Conversation
from scripts.web.engines import Loaded
from scripts.web.run_folders import RunFolder
from scripts.web.text import EXAMPLES, t, visitor_language


def show(args: Any) -> None:
    """Draw the page; ends when the completion does."""
    talk = st.session_state.setdefault("chat", Conversation())
    with st.sidebar:
        runs = controls.checkpoints_or_stop(args)
        run, base = controls.pick_checkpoint(runs, "picked", t("checkpoint"), args)
        settings = controls.completion_settings(args)
        st.button(
            t("new_chat"), icon=":material/add_comment:", width="stretch", on_click=start_again
        )
    loaded = controls.load_or_stop(run, base, args)
    with st.bottom:
        stop_place = st.empty()
        text = st.chat_input(t("message"), key="message") or st.session_state.pop("asked", None)
    if text:
        talk.ask(loaded, text, settings)
    if st.session_state.pop("again", False) and talk.turns:
        talk.regenerate(loaded, settings)
    welcome_place = st.empty()  # empty again, it wipes the welcome off the screen
    if not talk.turns:
        with welcome_place.container():
            welcome(run, loaded)
        return
    for turn in talk.turns:
        drawing.show_question(turn.text)
        view = drawing.show_turn(turn)
    again_place = st.empty()
    if talk.is_running:
        stop_place.button(t("stop"), icon=":material/stop_circle:", key="stop", on_click=talk.stop)
        drawing.follow(view)
        st.rerun()
    again_place.button(
        t("regenerate"), icon=":material/refresh:", key="regenerate", on_click=ask_again
    )


def start_again() -> None:
    """Forget the conversation."""
    st.session_state.setdefault("chat", Conversation()).stop()
    st.session_state.chat = Conversation()


def ask_again() -> None:
    """Let the next run of the page regenerate the last completion."""
    st.session_state.again = True


def ask_example(text: str, tool: str | None) -> None:
    """Let the next run of the page ask an example, with its tool on offer."""
    st.session_state.asked = text
    st.session_state.tools = [tool] if tool else []


def welcome(run: RunFolder, loaded: Loaded) -> None:
    """Draw an empty conversation: an introduction, and questions to try."""
    st.title("MiniMind")
    st.markdown(t("tagline"))
    st.caption(controls.caption(run))
    if not loaded.chats:
        st.info(t("completes"), icon=":material/edit_note:")
        return
    st.subheader(t("try"))
    with st.container(horizontal=True):
        for n, (text, tool) in enumerate(EXAMPLES[visitor_language()]):
            icon = ":material/build:" if tool else None
            st.button(text, key=f"example_{n}", icon=icon, on_click=ask_example, args=(text, tool))

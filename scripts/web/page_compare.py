"""The page that compares two checkpoints on the same prompt, in two columns."""

from typing import Any

import streamlit as st

from scripts.web import controls, drawing
from scripts.web.conversation import Conversation
from scripts.web.text import t

SIDES = ("left", "right")


def show(args: Any) -> None:
    """Draw the page; ends when both completions do."""
    talks = [st.session_state.setdefault(f"compare_{side}", Conversation()) for side in SIDES]
    with st.sidebar:
        runs = controls.checkpoints_or_stop(args)
        settings = controls.completion_settings(args)
        st.button(
            t("new_chat"), icon=":material/add_comment:", width="stretch", on_click=start_again
        )
    loaded = []
    for n, (column, side) in enumerate(zip(st.columns(2), SIDES)):
        with column:
            run, base = controls.pick_checkpoint(runs, side, t(side), args, default=n)
            loaded.append(controls.load_or_stop(run, base, args))
            if not loaded[-1].chats:
                st.caption(t("completes"))
    with st.bottom:
        stop_place = st.empty()
        text = st.chat_input(t("message"), key="message_to_both")
    if text:
        for talk, one in zip(talks, loaded):
            talk.ask(one, text, settings)
    if not talks[0].turns:
        st.info(t("compare_hint"), icon=":material/compare_arrows:")
        return
    for turns in zip(*(talk.turns for talk in talks)):
        drawing.show_question(turns[0].text)
        views = []
        for column, turn in zip(st.columns(2), turns):
            with column:
                views.append(drawing.show_turn(turn))
    if any(talk.is_running for talk in talks):
        stop_place.button(t("stop"), icon=":material/stop_circle:", key="stop", on_click=stop)
        drawing.follow(*views)
        st.rerun()


def stop() -> None:
    """End both completions."""
    for side in SIDES:
        st.session_state.setdefault(f"compare_{side}", Conversation()).stop()


def start_again() -> None:
    """Forget both conversations."""
    stop()
    for side in SIDES:
        st.session_state[f"compare_{side}"] = Conversation()

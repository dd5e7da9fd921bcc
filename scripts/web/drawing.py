"""Turns on the screen; one that is being written is drawn again and again, and only what has changed is sent."""

import json

import streamlit as st

from scripts.web.state import t

TICK = 0.08  # seconds between two looks at what was written
USER, ASSISTANT = ":material/person:", ":material/neurology:"


def show_question(text):
    """A message of the user, as it was typed."""
    with st.chat_message("user", avatar=USER):
        st.text(text)


def show_turn(turn):
    """An answer as it stands now; returns the TurnView, which can follow it."""
    with st.chat_message("assistant", avatar=ASSISTANT):
        view = TurnView(turn)
    view.draw()
    return view


def follow(*views):
    """Draw turns while they are being written; ends with the last of them."""
    while any(view.turn.is_running for view in views):
        for view in views:
            if view.turn.is_running:
                view.turn.advance(TICK / len(views))
                view.draw()


class TurnView:
    """Places on the screen for a turn: its replies, and a line of figures below."""

    def __init__(self, turn):
        self.turn, self.replies = turn, []
        self.body, self.error, self.footer = st.container(), st.empty(), st.empty()

    def draw(self):
        """Bring the screen up to date."""
        turn = self.turn
        while len(self.replies) < len(turn.replies):
            with self.body:
                self.replies.append(ReplyView())
        for view, reply in zip(self.replies, turn.replies):
            view.draw(reply, turn.is_running and reply is turn.replies[-1])
        if turn.error:
            self.error.error(t("engine_error", error=turn.error), icon=":material/error:")
        if turn.replies:
            self.footer.caption(figures(turn))


def figures(turn):
    """The line below an answer: how much was written and how fast."""
    numbers = turn.stats()
    if turn.is_running and not numbers["tokens"]:
        return f"{turn.loaded.name} · {t('waiting')}"
    shown = {name: f"{numbers[name]:,}" for name in ("tokens", "prompt", "reused")}
    shown |= {"speed": f"{numbers['speed']:,.0f}", "first": f"{numbers['first']:.2f}"}
    notes = [t(turn.note)] if turn.note else []
    if turn.num_left_out:
        notes.append(t("left_out", count=turn.num_left_out))
    return " · ".join([turn.loaded.name, t("stats_short" if turn.is_running else "stats", **shown), *notes])


class ReplyView:
    """Places for one reply: its reasoning, folded; its text; the tools that it called."""

    def __init__(self):
        self.reasoning_place, self.text, self.calls_place = st.container(), st.empty(), st.container()
        self.status = self.reasoning = None
        self.drawn, self.num_calls = {}, 0

    def draw(self, reply, is_running):
        """Bring the reply up to date."""
        message = reply.message
        if message.get("reasoning_content", "").strip():
            self._draw_reasoning(message["reasoning_content"], is_running and reply.parser.in_reasoning)
        self._draw_text(message["content"], is_running)
        for name, arguments, result in reply.results[self.num_calls:]:
            with self.calls_place:
                show_call(name, arguments, result)
        self.num_calls = len(reply.results)

    def _changed(self, what, value):
        """Whether this is not what is on the screen."""
        before, self.drawn[what] = self.drawn.get(what), value
        return before != value

    def _draw_reasoning(self, text, is_going):
        if self.status is None:
            self.status = self.reasoning_place.status(t("writing"), state="running")
            self.reasoning = self.status.empty()
        if self._changed("reasoning", text):
            self.reasoning.markdown(text)
        if self._changed("is_going", is_going) and not is_going:
            self.status.update(label=t("thought"), state="complete")

    def _draw_text(self, text, is_running):
        shown = text.strip() + (" ▌" if is_running else "")
        if self._changed("text", shown) and shown:
            self.text.markdown(shown)


def show_call(name, arguments, result):
    """A tool call and what it returned."""
    failed = "error" in json.loads(result)
    with st.container(border=True, gap="xsmall"):
        st.markdown(f":material/build: **{t('call_failed' if failed else 'called', name=f'`{name}`')}**")
        call, answer = st.columns(2, gap="small")
        with call:
            st.caption(t("arguments"))
            st.code(json.dumps(arguments, ensure_ascii=False), language="json", wrap_lines=True)
        with answer:
            st.caption(t("result"))
            st.code(result, language="json", wrap_lines=True)

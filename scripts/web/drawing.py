"""Turns on the screen; a running one is drawn again and again, and only changes are sent."""

import json
import re

import streamlit as st

from scripts.web.conversation import Completion, Turn
from scripts.web.text import t

TICK = 0.08  # seconds between two looks at the output
USER, ASSISTANT = ":material/person:", ":material/neurology:"

CODE = re.compile(r"(```.*?(?:```|\Z)|`[^`\n]*`)", re.DOTALL)


def as_written(text: str) -> str:
    """Markdown that shows an answer as the model wrote it: Markdown, without Streamlit's own signs.

    Outside of code `3~5` is not struck through, `:red[a]`, `:smile:` and `:material/home:` are
    text, and a line ends where it ends.
    """
    parts = CODE.split(text)
    for i in range(0, len(parts), 2):
        part = parts[i].replace("~", r"\~")
        # no escape keeps icons from being drawn: a word joiner, which nobody sees, does
        part = re.sub(r":(?=material/|[\w+-]+:)", ":\u2060", part)
        part = re.sub(r":(?=[\w+-]+\[)", r"\\:", part)
        parts[i] = re.sub(r"(?<!\n)\n(?!\n)", "  \n", part)
    return "".join(parts)


def show_question(text: str) -> None:
    """A message of the user, as it was typed."""
    with st.chat_message("user", avatar=USER):
        st.text(text)


def show_turn(turn: Turn) -> "TurnView":
    """Draw a turn as it is now; returns the TurnView, which can follow it."""
    with st.chat_message("assistant", avatar=ASSISTANT):
        view = TurnView(turn)
    view.draw()
    return view


def follow(*views: "TurnView") -> None:
    """Draw turns while they run; ends with the last of them."""
    while any(view.turn.is_running for view in views):
        for view in views:
            if view.turn.is_running:
                view.turn.advance(TICK / len(views))
                view.draw()


class TurnView:
    """Places on the screen for a turn: its completions, and a line of statistics below."""

    def __init__(self, turn: Turn):
        self.turn, self.views = turn, []
        self.body, self.error, self.footer = st.container(), st.empty(), st.empty()

    def draw(self) -> None:
        """Bring the screen up to date."""
        turn = self.turn
        while len(self.views) < len(turn.completions):
            with self.body:
                self.views.append(CompletionView())
        for view, completion in zip(self.views, turn.completions):
            view.draw(completion, turn.is_running and completion is turn.completions[-1])
        if turn.error:
            self.error.error(t("engine_error", error=turn.error), icon=":material/error:")
        if turn.completions:
            self.footer.caption(statistics(turn))


def statistics(turn: Turn) -> str:
    """The line below a turn: its length and its speed."""
    numbers = turn.stats()
    if turn.is_running and not numbers["tokens"]:
        return f"{turn.loaded.name} · {t('waiting')}"
    shown = {name: f"{numbers[name]:,}" for name in ("tokens", "prompt", "reused")}
    shown |= {"speed": f"{numbers['speed']:,.0f}", "first": f"{numbers['first']:.2f}"}
    notes = [t(turn.note)] if turn.note else []
    if turn.num_left_out:
        notes.append(t("left_out", count=turn.num_left_out))
    return " · ".join(
        [turn.loaded.name, t("stats_short" if turn.is_running else "stats", **shown), *notes]
    )


class CompletionView:
    """Places for one completion: its reasoning, folded; its text; the tools that it called."""

    def __init__(self) -> None:
        self.reasoning_place = st.container()
        self.text = st.empty()
        self.calls_place = st.container()
        self.status = self.reasoning = None
        self.drawn, self.num_calls = {}, 0

    def draw(self, completion: Completion, is_running: bool) -> None:
        """Bring the completion up to date."""
        message = completion.message
        if message.get("reasoning_content", "").strip():
            is_open = is_running and completion.parser.in_reasoning
            self._draw_reasoning(message["reasoning_content"], is_open)
        self._draw_text(message["content"], is_running)
        for name, arguments, result in completion.results[self.num_calls :]:
            with self.calls_place:
                show_call(name, arguments, result)
        self.num_calls = len(completion.results)

    def _changed(self, part: str, value: object) -> bool:
        """Whether the screen shows another value of this part."""
        before, self.drawn[part] = self.drawn.get(part), value
        return before != value

    def _draw_reasoning(self, text: str, is_open: bool) -> None:
        if self.status is None:
            self.status = self.reasoning_place.status(t("writing"), state="running")
            self.reasoning = self.status.empty()
        if self._changed("reasoning", text):
            self.reasoning.markdown(as_written(text))
        if self._changed("is_open", is_open) and not is_open:
            self.status.update(label=t("reasoning"), state="complete")

    def _draw_text(self, text: str, is_running: bool) -> None:
        shown = text.strip() + (" ▌" if is_running else "")
        if self._changed("text", shown) and shown:
            self.text.markdown(as_written(shown))


def show_call(name: str, arguments: dict, result: str) -> None:
    """Draw a tool call and its result."""
    failed = "error" in json.loads(result)
    with st.container(border=True, gap="xsmall"):
        st.markdown(
            f":material/build: **{t('call_failed' if failed else 'called', name=f'`{name}`')}**"
        )
        call, answer = st.columns(2, gap="small")
        with call:
            st.caption(t("arguments"))
            st.code(json.dumps(arguments, ensure_ascii=False), language="json", wrap_lines=True)
        with answer:
            st.caption(t("result"))
            st.code(result, language="json", wrap_lines=True)

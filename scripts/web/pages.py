"""The frame of all pages: their list, the style, the language, the settings that stay."""

from pathlib import Path
from typing import Any

import streamlit as st

from scripts.web import controls, page_chat, page_compare, page_curves
from scripts.web.text import LANGUAGES, t, visitor_language

PAGES = {
    "chat": (page_chat, ":material/forum:"),
    "compare": (page_compare, ":material/compare_arrows:"),
    "curves": (page_curves, ":material/show_chart:"),
}
# controls whose values stay when a page is shown that does not have them; Streamlit forgets them
KEPT = (
    *("picked", "picked_base", "left", "left_base", "right", "right_base"),
    *controls.DEFAULTS,
    *("runs", "against", "metrics", "smoothing", "log_scale"),
)
STYLE = """<style>
[data-testid="stStatusWidget"] {display: none}  /* its Stop would end the drawing, not the answer */
[data-testid="stMainBlockContainer"] {max-width: 68rem; padding-top: 4.5rem}
[data-testid="stChatMessage"] {padding: 0.75rem; gap: 0.75rem}
[data-testid="stChatMessage"] [data-testid="stText"] {font-size: 1rem}
[data-testid="stChatMessage"]:has([aria-label="Chat message from user"]) {
  width: fit-content; max-width: 85%; margin-left: auto;
  padding: 0.6rem 1.1rem; border-radius: 1.2rem;
  background: color-mix(in srgb, currentColor 7%, transparent)
}
[data-testid="stChatMessage"]:has([aria-label="Chat message from user"])
  [data-testid^="stChatMessageAvatar"] {display: none}
</style>"""


def draw(args: Any) -> None:
    """Draw the page that is asked for; args: the flags of web_demo.py."""
    st.set_page_config(page_title="MiniMind", page_icon=":material/neurology:", layout="wide")
    st.html(STYLE)
    st.logo(Path(__file__).with_name("logo.svg"), size="large")
    for key in KEPT:
        if key in st.session_state:
            st.session_state[key] = st.session_state[key]
    visitor_language()
    pages = [
        st.Page(
            lambda module=module: module.show(args),
            title=t(name),
            icon=icon,
            url_path=name,
            default=name == "chat",
        )
        for name, (module, icon) in PAGES.items()
    ]
    page = st.navigation(pages, position="top")
    with st.sidebar:
        st.segmented_control(
            t("language"),
            list(LANGUAGES),
            key="language",
            format_func=LANGUAGES.get,
            required=True,
            width="stretch",
            label_visibility="collapsed",
        )
    page.run()

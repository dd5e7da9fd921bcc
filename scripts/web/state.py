"""What the page remembers of one visitor: the language, the settings, the conversations."""

import streamlit as st

from scripts.web import text

KEPT = ("picked", "picked_base", "left", "left_base", "right", "right_base", "temperature", "top_p", "top_k", "max_tokens",
        "seed", "thinking", "tools", "system", "runs", "against", "metrics", "smoothing", "log_scale")


def t(key, **fields):
    """The text `key` in the visitor's language."""
    return text.say(language(), key, **fields)


def language():
    """The visitor's language: chosen, or else named in the address, or else the browser's."""
    if st.session_state.get("language") not in text.LANGUAGES:
        wanted = st.query_params.get("lang") or (st.context.locale or "en")[:2]
        st.session_state.language = wanted if wanted in text.LANGUAGES else "en"
    return st.session_state.language


def keep_settings():
    """Carry over what was set on another page: Streamlit forgets controls that a page does not draw."""
    for key in KEPT:
        if key in st.session_state:
            st.session_state[key] = st.session_state[key]


def remembered(name, make):
    """The visitor's object of that name; `make()` makes it the first time."""
    if name not in st.session_state:
        st.session_state[name] = make()
    return st.session_state[name]

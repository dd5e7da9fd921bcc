"""Conversations: the template's spans, parsing of replies, tools that are really run."""

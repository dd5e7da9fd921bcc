"""Clean rows: text in one normal form, and rules that tell text from rubbish.

The rules are Gopher's (Rae et al. 2021, appendix A) where they hold for Chinese, code and
conversations alike; their thresholds were set by reading the rows that they drop from real corpora.
They look at single rows, in batches.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from dataset.prepare.text_tokens import Tokens, text_of

# Control characters but tab and line feed; zero-width space, word joiner, byte order mark, soft
# hyphen. Not the zero-width joiners U+200C and U+200D: Persian, Indic scripts and emoji are spelled
# with them.
INVISIBLE = re.compile("[\x00-\x08\x0e-\x1f\x7f\x80-\x84\x86-\x9f\xad\u200b\u2060\ufeff]")
LINE_ENDS = re.compile("\r\n|[\r\x0b\x0c\x85\u2028\u2029]")
UNCLEAN = re.compile(f"{INVISIBLE.pattern[:-1]}\r\x0b\x0c\x85\u2028\u2029]")
MAIN_KEYS = ("text", "conversations", "chosen", "rejected")
VERIFIED = ("answer", "gt")
CONVERSATION_REPEATS = 0.8
MESSAGE_KEYS = ("content", "reasoning_content", "tools", "tool_calls")


@dataclass(frozen=True)
class Limits:
    """Thresholds of the filters; ratios from 0 to 1.

    The rules from `min_letters` on are for running text. A good conversation may be a table, a list
    of sums, code that is quoted and repaired; of these rules it keeps one, and goes only if nearly
    all of it (0.8) is repetition.
    """

    min_chars: int | None = None  # but spaces; None: 20 for running text, 2 for others
    max_chars: int = 1_000_000
    max_replacement: float = 0.001  # U+FFFD, which a wrong decoding leaves
    # letters and ideographs among all characters but spaces, from 100 characters on
    min_letters: float = 0.3
    max_repeated_lines: float = 0.5  # characters in lines that stood there before, from 10 lines on
    max_top_ngram: float = 0.3  # tokens that belong to the most frequent 4-gram, from 100 tokens on
    # tokens in 12-grams that stood there before, from 100 tokens on
    max_repeated_ngrams: float = 0.5

    def check(self) -> None:
        """ValueError for a threshold that no text could meet or miss."""
        for one in fields(Limits):
            value = getattr(self, one.name)
            if isinstance(one.default, float) and not 0 <= value <= 1:
                raise ValueError(f"--{one.name} {value}: give a ratio between 0 and 1")
        if (self.min_chars or 0) < 0 or self.max_chars < 1:
            raise ValueError(
                "--min_chars and --max_chars: give numbers of characters, at least 0 and 1"
            )


def normalize_text(text: str, form: str = "NFC") -> str:
    """Return the text in a Unicode normal form, with "\\n" as the only line end and without
    invisible characters.

    NFC, not NFKC: that would turn full-width punctuation, superscripts and mathematical letters
    into others.
    """
    if UNCLEAN.search(text):
        text = INVISIBLE.sub("", LINE_ENDS.sub("\n", text))
    is_normal = text.isascii() or unicodedata.is_normalized(form, text)
    return text if is_normal else unicodedata.normalize(form, text)


def normalize_row(value: Any, form: str = "NFC") -> Any:
    """Return a row with every string in it normalised; keys stay."""
    if isinstance(value, str):
        return normalize_text(value, form)
    if isinstance(value, list):
        return [normalize_row(item, form) for item in value]
    if isinstance(value, dict):
        return {key: normalize_row(item, form) for key, item in value.items()}
    return value


def row_text(row: dict) -> str:
    """Return all text of a row, one segment after the other, for filters and de-duplication.

    Of messages that is content, reasoning, tools and calls; a segment that comes twice (the prompt
    of a preference row) counts once. A row of another form than dataset.md has gives all its
    strings.
    """
    if not any(key in row for key in MAIN_KEYS):
        return "\n".join(all_strings(row))
    segments = []
    for key in (*MAIN_KEYS, *VERIFIED):
        segments += _segments(row.get(key))
    return "\n".join(dict.fromkeys(segments))


def check_readable(row: dict) -> None:
    """ValueError unless the row has some stage's main keys; training checks their content."""
    is_preference = isinstance(row.get("chosen"), list) and isinstance(row.get("rejected"), list)
    if not (
        isinstance(row.get("text"), str)
        or isinstance(row.get("conversations"), list)
        or is_preference
    ):
        raise ValueError(
            f'no stage reads a row with the keys {list(row)}. It needs a "text", a list '
            '"conversations", or lists "chosen" and "rejected"; convert rows of other formats '
            "first."
        )


def row_answers(row: dict) -> tuple[str, str]:
    """Return the texts that near-duplicates must share, however much else they share, such as a
    long passage.

    They are all that the assistant says and the verifier checks, and for a preference row the last
    message of either side.
    """
    if "chosen" in row and "rejected" in row:
        return tuple(
            "\n".join(_segments(row[side][-1:] if isinstance(row[side], list) else row[side]))
            for side in ("chosen", "rejected")
        )
    messages = row.get("conversations")
    said = [
        message
        for message in (messages if isinstance(messages, list) else [])
        if isinstance(message, dict) and message.get("role") == "assistant"
    ]
    return "\n".join(_segments([*said, *(row.get(key) for key in VERIFIED)])), ""


def _segments(value: object) -> list[str]:
    """Return the texts in a string, a message, or a list of them."""
    parts = []
    for part in value if isinstance(value, list) else [value]:
        parts += map(part.get, MESSAGE_KEYS) if isinstance(part, dict) else [part]
    return [
        part if isinstance(part, str) else json.dumps(part, ensure_ascii=False)
        for part in parts
        if part
    ]


def all_strings(value: object) -> Iterator[str]:
    """Yield every string in a JSON value but the keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for item in value if isinstance(value, list) else value.values():
            yield from all_strings(item)


def text_key(text: str) -> bytes:
    """Return 16 bytes, equal for texts that are equal but for letter case and runs of spaces."""
    return hashlib.blake2b(" ".join(text.lower().split()).encode(), digest_size=16).digest()


def judge(texts: list[str], is_document: np.ndarray, tokens: Tokens, limits: Limits) -> list[str]:
    """Return why each text must go, or "". is_document: bool [R], running text, no conversation."""
    num_tokens = np.diff(tokens.starts())
    min_chars = np.where(is_document, 20, 2) if limits.min_chars is None else limits.min_chars
    max_repeated = np.where(
        is_document,
        limits.max_repeated_ngrams,
        max(limits.max_repeated_ngrams, CONVERSATION_REPEATS),
    )
    max_repeated = np.where(num_tokens >= 100, max_repeated * num_tokens, np.inf)
    letters = tokens.letters / np.maximum(tokens.solid, 1)
    rules = {
        "too_short": tokens.solid < min_chars,
        "too_long": tokens.chars > limits.max_chars,
        "replacement_characters": np.array([text.count("\ufffd") for text in texts])
        > limits.max_replacement * tokens.chars,
        "few_letters": is_document & (tokens.solid >= 100) & (letters < limits.min_letters),
        "repeated_lines": np.array(
            [
                is_text and repeated_lines(text) > limits.max_repeated_lines
                for text, is_text in zip(texts, is_document, strict=True)
            ],
            bool,
        ),
        "top_ngram": is_document
        & (num_tokens >= 100)
        & (4 * top_ngram(tokens, 4) > limits.max_top_ngram * num_tokens),
        "repeated_ngrams": repeated_ngrams(tokens, 12, max_repeated) > max_repeated,
    }
    reasons = [""] * len(texts)
    for reason, broken in reversed(rules.items()):  # the first rule that is broken names the reason
        for i in np.flatnonzero(broken):
            reasons[i] = reason
    return reasons


def repeated_lines(text: str) -> float:
    """Return the ratio of characters in repeated lines; 0 for fewer than 10 lines."""
    lines = [line.strip() for line in text.split("\n")]
    if len(lines) < 10:
        return 0.0
    again = sum(len(line) * (count - 1) for line, count in Counter(lines).items() if count > 1)
    return again / max(sum(map(len, lines)), 1)


def top_ngram(tokens: Tokens, n: int) -> np.ndarray:
    """Return how often the most frequent n-gram of each text occurs: int64 [R]."""
    keys = np.sort(tokens.keys(*tokens.ngrams(n)))
    begins = np.flatnonzero(np.diff(keys, prepend=~keys[:1]))
    out = np.zeros(len(tokens.chars), np.int64)
    np.maximum.at(out, text_of(keys[begins]), np.diff(begins, append=len(keys)))
    return out


def repeated_ngrams(tokens: Tokens, n: int, enough: np.ndarray) -> np.ndarray:
    """Return how many tokens of each text lie in an n-gram that occurred before in it: int64 [R].

    enough: float [R]; where the number cannot exceed it, 0 is returned. That spares nearly all the
    work.
    """
    hashes, first = tokens.ngrams(n)
    keys = tokens.keys(hashes, first)
    in_order = np.sort(keys)
    repeats = np.bincount(
        text_of(in_order[1:][in_order[1:] == in_order[:-1]]), minlength=len(tokens.chars)
    )
    looked_at = (n * repeats > enough)[tokens.text[first]]
    keys, first = keys[looked_at], first[looked_at]
    _, originals = np.unique(keys, return_index=True)
    again = np.delete(first, originals)
    change = np.zeros(len(tokens.text) + 1, np.int64)
    change[again] += 1
    change[again + n] -= 1
    return np.bincount(tokens.text[np.cumsum(change)[:-1] > 0], minlength=len(tokens.chars))

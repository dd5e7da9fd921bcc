"""What a clean row is: text in one normal form, and rules that tell text from rubbish.

The rules are Gopher's (Rae et al. 2021, appendix A) where they hold for Chinese, code and conversations alike; their
thresholds were set by reading what they threw away on real corpora. They look at single rows, in batches.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass

import numpy as np

from dataset.text_tokens import Tokens, scramble

# Control characters but tab and line feed; zero-width space, word joiner, byte order mark, soft hyphen. Not the zero-width
# joiners U+200C and U+200D: Persian, Indic scripts and emoji are spelled with them.
INVISIBLE = re.compile("[\x00-\x08\x0e-\x1f\x7f\x80-\x84\x86-\x9f\xad\u200b\u2060\ufeff]")
LINE_ENDS = re.compile("\r\n|[\r\x0b\x0c\x85\u2028\u2029]")
SEGMENT_KEYS = ("text", "conversations", "chosen", "rejected", "answer", "gt")
MESSAGE_KEYS = ("content", "reasoning_content", "tools", "tool_calls")


@dataclass(frozen=True)
class Limits:
    """Thresholds of the filters; shares are of 1. `min_chars` None: 20 for text rows, 2 for others."""

    min_chars: int | None = None
    max_chars: int = 1_000_000
    min_letters: float = 0.35  # letters and ideographs among all characters but spaces, from 100 characters on
    max_replacement: float = 0.001  # U+FFFD, what a wrong decoding leaves
    max_repeated_lines: float = 0.4  # characters in lines that stood there before, from 10 lines on
    max_top_ngram: float = 0.2  # tokens that belong to the most frequent 4-gram, from 100 tokens on
    max_repeated_ngrams: float = 0.5  # tokens in 12-grams that stood there before, from 100 tokens on

    def check(self) -> None:
        """ValueError for a threshold that no text could meet or miss."""
        for name in ("min_letters", "max_replacement", "max_repeated_lines", "max_top_ngram", "max_repeated_ngrams"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--{name} {getattr(self, name)}: give a share between 0 and 1")
        if (self.min_chars or 0) < 0 or self.max_chars < 1:
            raise ValueError("--min_chars and --max_chars: give numbers of characters, at least 0 and 1")


def normalize_text(text: str, form: str = "NFC") -> str:
    """Return the text in a Unicode normal form, with "\\n" as the only line end and without invisible characters.

    NFC, not NFKC: that would turn full-width punctuation, superscripts and mathematical letters into others.
    """
    if text.isascii() and text.isprintable():
        return text
    text = INVISIBLE.sub("", LINE_ENDS.sub("\n", text))
    return text if unicodedata.is_normalized(form, text) else unicodedata.normalize(form, text)


def normalize_row(value, form: str = "NFC"):
    """Return a row with every string in it normalised; keys stay."""
    if isinstance(value, str):
        return normalize_text(value, form)
    if isinstance(value, list):
        return [normalize_row(item, form) for item in value]
    if isinstance(value, dict):
        return {key: normalize_row(item, form) for key, item in value.items()}
    return value


def row_text(row: dict) -> str:
    """Return all text of a row, one segment after the other: what filters and de-duplication judge.

    Of messages that is content, reasoning, tools and calls; a segment that comes twice (the prompt of a preference
    row) counts once. A row of another form gives all its strings.
    """
    known = [row[key] for key in SEGMENT_KEYS if key in row]
    return "\n".join(dict.fromkeys(segment for segment in _segments(known or list(row.values())) if segment))


def _segments(value):
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _segments(item)
    elif isinstance(value, dict):
        is_message = "content" in value
        for key in MESSAGE_KEYS if is_message else value:
            yield from _segments(value.get(key))


def text_key(text: str) -> bytes:
    """Return 16 bytes that are equal where two texts are, but for the case of letters and runs of spaces."""
    return hashlib.blake2b(" ".join(text.lower().split()).encode(), digest_size=16).digest()


def judge(texts: list[str], is_document: list[bool], tokens: Tokens, limits: Limits) -> list[str]:
    """Return for each text why it must go, or "". is_document: rows of running text rather than conversations."""
    num_tokens = np.diff(tokens.starts())
    counted = num_tokens >= 100
    letters = tokens.letters / np.maximum(tokens.solid, 1)
    rules = {
        "too_short": tokens.solid < [_min_chars(limits, document) for document in is_document],
        "too_long": tokens.chars > limits.max_chars,
        "replacement_characters": np.array([text.count("\ufffd") for text in texts])
        > limits.max_replacement * tokens.chars,
        "few_letters": (tokens.solid >= 100) & (letters < limits.min_letters),
        "repeated_lines": np.array([repeated_lines(text) for text in texts]) > limits.max_repeated_lines,
        "top_ngram": counted & (4 * top_ngram(tokens, 4) > limits.max_top_ngram * num_tokens),
        "repeated_ngrams": counted & (repeated_ngrams(tokens, 12) > limits.max_repeated_ngrams * num_tokens),
    }
    reasons = [""] * len(texts)
    for reason, broken in reversed(rules.items()):  # the first rule that is broken names the reason
        for i in np.flatnonzero(broken):
            reasons[i] = reason
    return reasons


def _min_chars(limits: Limits, is_document: bool) -> int:
    return limits.min_chars if limits.min_chars is not None else 20 if is_document else 2


def repeated_lines(text: str) -> float:
    """Return the share of characters in lines that stood in the text before; 0 for fewer than 10 lines."""
    lines = [line.strip() for line in text.split("\n")]
    if len(lines) < 10:
        return 0.0
    again = sum(len(line) * (count - 1) for line, count in Counter(lines).items())
    return again / max(sum(map(len, lines)), 1)


def top_ngram(tokens: Tokens, n: int) -> np.ndarray:
    """Return how often the most frequent n-gram of each text occurs: int64 [R]."""
    keys, text = _keys_per_text(tokens, n)
    _, first, counts = np.unique(keys, return_index=True, return_counts=True)
    out = np.zeros(len(tokens.chars), np.int64)
    np.maximum.at(out, text[first], counts)
    return out


def repeated_ngrams(tokens: Tokens, n: int) -> np.ndarray:
    """Return how many tokens of each text lie in an n-gram that occurred before in it: int64 [R]."""
    hashes, start = tokens.ngrams(n)
    keys, text = scramble(hashes + tokens.text[start].astype(np.uint64)), tokens.text
    _, first = np.unique(keys, return_index=True)
    again = np.ones(len(keys), bool)
    again[first] = False
    change = np.zeros(len(text) + 1, np.int64)
    change[start[again]] += 1
    change[start[again] + n] -= 1
    return np.bincount(text[np.cumsum(change)[:-1] > 0], minlength=len(tokens.chars))


def _keys_per_text(tokens: Tokens, n: int) -> tuple[np.ndarray, np.ndarray]:
    hashes, first = tokens.ngrams(n)
    text = tokens.text[first]
    return scramble(hashes + text.astype(np.uint64)), text

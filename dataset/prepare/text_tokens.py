"""Words and ideographs of many texts at once, as numpy arrays of hashes, for filters and
de-duplication.

A token is a run of letters and digits, or one character of a script that is written without spaces
(Chinese, Japanese, Thai, ...). Case, punctuation and spacing do not count. All texts of a batch are
laid end to end and cut, hashed and joined to n-grams by array operations, which makes cleaning
fast. The hashes are fixed: the same in every process.

N tokens, R texts, C characters.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from dataset.files.hashes import scramble

SPACE, SYMBOL, DIGIT, LETTER, IDEOGRAPH = range(5)
NO_SPACES = (
    (0x0E00, 0x0EFF),
    (0x1000, 0x109F),
    (0x1780, 0x17FF),  # Thai, Lao, Burmese, Khmer
    (0x3005, 0x3007),
    (0x3040, 0x30FF),
    (0x31F0, 0x31FF),
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0xFF66, 0xFF9F),
    (0x20000, 0x3FFFF),
)
TEXT_BITS = np.uint64(20)  # so many texts at once
BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, hence invertible modulo 2**64
BASE_INVERSE = np.uint64(pow(0x9E3779B97F4A7C15, -1, 2**64))


@dataclass
class Tokens:
    """The tokens of R texts in their order.

    hashes: uint64 [N]. text: int64 [N], the text that a token is in. ideograph, digit, content:
    bool [N], one ideograph; a word that begins with a digit; an ideograph or a word of two letters
    or more. letters, solid, chars: int64 [R], letters and ideographs, all but spaces, all
    characters.
    """

    hashes: np.ndarray
    text: np.ndarray
    ideograph: np.ndarray
    digit: np.ndarray
    content: np.ndarray
    letters: np.ndarray
    solid: np.ndarray
    chars: np.ndarray

    def starts(self) -> np.ndarray:
        """Return where each text's tokens begin, and N: int64 [R + 1]."""
        return np.searchsorted(self.text, np.arange(len(self.chars) + 1))

    def ngrams(self, n: int, whole: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Return (hashes uint64 [M], index of the first token int64 [M]) of all n-grams, none
        across two texts.

        whole: a text of fewer than n tokens counts as one n-gram.
        """
        count = len(self.hashes)
        powers, inverse = _powers(count)
        # modulo 2**64
        sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(self.hashes * powers)])
        bounds = self.starts()
        first, end = np.arange(count), bounds[self.text + 1]
        inside = first + n <= end
        if whole:
            inside |= first == bounds[self.text]
        first = first[inside]
        last = np.minimum(first + n, end[inside])
        return scramble((sums[last] - sums[first]) * inverse[first]), first

    def keys(self, hashes: np.ndarray, first: np.ndarray) -> np.ndarray:
        """Return hashes whose low bits name the text: sorted, repetitions within a text meet."""
        return (hashes << TEXT_BITS) | self.text[first].astype(np.uint64)


def text_of(keys: np.ndarray) -> np.ndarray:
    """Return the text that each of `Tokens.keys` names: int64."""
    return (keys & ((np.uint64(1) << TEXT_BITS) - np.uint64(1))).astype(np.int64)


def tokenize(texts: list[str]) -> Tokens:
    """Cut texts into tokens. They must hold no NUL, which separates them here."""
    codes = np.frombuffer("\0".join([*texts, ""]).lower().encode("utf-32-le"), dtype=np.uint32)
    kind = _kinds()[codes]
    ends = np.flatnonzero(codes == 0)
    assert len(ends) == len(texts) < 1 << int(TEXT_BITS), "a text holds a NUL, or too many texts"
    begins = np.concatenate([[0], ends + 1])
    word = (kind == DIGIT) | (kind == LETTER)
    starts = np.flatnonzero((kind == IDEOGRAPH) | (word & ~np.concatenate([[False], word[:-1]])))
    owner = np.searchsorted(ends, starts)
    token_kind = kind[starts]
    ideograph = token_kind == IDEOGRAPH
    # the last character is a separator: no token starts there
    content = ideograph | ((token_kind == LETTER) & word[starts + 1])
    return Tokens(
        _hash_tokens(codes, kind > SYMBOL, starts),
        owner,
        ideograph,
        token_kind == DIGIT,
        content,
        letters=_count(kind > DIGIT, begins),
        solid=_count(kind > SPACE, begins),
        chars=np.diff(begins) - 1,
    )


def _hash_tokens(codes: np.ndarray, counts: np.ndarray, starts: np.ndarray) -> np.ndarray:
    if not len(starts):
        return np.zeros(0, np.uint64)
    # with the separators that follow, which count as 0
    lengths = np.diff(starts, append=len(codes))
    position = np.arange(starts[0], len(codes)) - np.repeat(starts, lengths)
    values = scramble(codes[starts[0] :].astype(np.uint64)) * counts[starts[0] :]
    return scramble(np.add.reduceat(values * _powers(64)[0][position & 63], starts - starts[0]))


def _count(mask: np.ndarray, begins: np.ndarray) -> np.ndarray:
    sums = np.concatenate([[0], np.cumsum(mask)])
    return np.diff(sums[begins])


@lru_cache(maxsize=8)
def _powers_up_to(size: int) -> tuple[np.ndarray, np.ndarray]:
    with np.errstate(over="ignore"):
        factors = (np.full(size, base) for base in (BASE, BASE_INVERSE))
        return tuple(np.cumprod(np.concatenate([np.ones(1, np.uint64), f])) for f in factors)


def _powers(count: int) -> tuple[np.ndarray, np.ndarray]:
    # few sizes, so that they are kept
    powers, inverse = _powers_up_to(1 << max(count, 1).bit_length())
    return powers[:count], inverse[:count]


@lru_cache
def _kinds() -> np.ndarray:
    """What each code point is: uint8 [0x110000]."""
    by_letter = dict(zip("LMNZCPS", (LETTER, LETTER, DIGIT, SPACE, SPACE, SYMBOL, SYMBOL)))
    kinds = np.array(
        [by_letter[unicodedata.category(chr(code))[0]] for code in range(0x110000)], np.uint8
    )
    for low, high in NO_SPACES:
        span = kinds[low : high + 1]
        span[span == LETTER] = IDEOGRAPH
    kinds[0x20000:0x40000] = IDEOGRAPH  # newer ideographs than this Python knows count too
    kinds[0xFFFD] = SYMBOL
    return kinds

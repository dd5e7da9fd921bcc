"""Find training rows that hold a piece of an evaluation file: a model that has read the test cannot
be measured by it.

As in GPT-3 (Brown et al. 2020, appendix C) a piece is an n-gram of 13 words; Chinese needs 20
characters to say as much. Letter case, punctuation and spacing do not count. N-grams that several
items of an evaluation file share are its phrasing ("which of the following ..."), not its content,
and are not looked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from dataset.files.jsonl import read_rows
from dataset.prepare.cleaning import all_strings, normalize_row, text_key
from dataset.prepare.text_tokens import Tokens, tokenize

WORDS, IDEOGRAPHS = 13, 20
MOST = 0.6
SHARED = 3  # an n-gram in that many different items of a file is phrasing
FILTER_BITS = 24
ROWS_AT_A_TIME = 10_000
LABELS = frozenset(
    "subject source task_id phenomenon paradigm category level type id entry_point".split()
)


@dataclass
class EvaluationIndex:
    """Sorted hashes of the n-grams of evaluation files, and for each the item that it is from.

    hashes: uint64 [M]. owner: int64 [M], an index into `places`. places: "file:line" of every item
    but those that repeat another of their file. short: items that are too short to be looked for.
    coarse: bool [2**FILTER_BITS], a first sieve that spares nearly all look-ups.
    """

    hashes: np.ndarray
    owner: np.ndarray
    places: list[str]
    short: int
    coarse: np.ndarray

    def find(self, tokens: Tokens) -> np.ndarray:
        """Return for each text the first item that it holds a piece of, or -1: int64 [R]."""
        found = np.full(len(tokens.chars), -1)
        hashes, first = content_ngrams(tokens)
        maybe = np.flatnonzero(self.coarse[hashes >> np.uint64(64 - FILTER_BITS)])
        place = np.searchsorted(self.hashes, hashes[maybe])
        hit = np.append(self.hashes, np.uint64(0))[place] == hashes[maybe]
        hit &= place < len(self.hashes)
        at, items = first[maybe[hit]], self.owner[place[hit]]
        backwards = np.argsort(-at)  # so that the first one stays
        found[tokens.text[at[backwards]]] = items[backwards]
        return found


def content_ngrams(tokens: Tokens) -> tuple[np.ndarray, np.ndarray]:
    """Return (hashes, first token) of the n-grams that identify content: 13 words, or 20 tokens
    with an ideograph.

    Most of their tokens are ideographs or words of two letters or more: "2 3 5 7 11 13 ..." is in
    no one's property.
    """
    ideographs, content = (
        np.concatenate([[0], np.cumsum(mask)]) for mask in (tokens.ideograph, tokens.content)
    )
    parts = []
    for n, wants_ideographs in ((WORDS, False), (IDEOGRAPHS, True)):
        hashes, first = tokens.ngrams(n)
        chosen = (ideographs[first + n] > ideographs[first]) == wants_ideographs
        chosen &= content[first + n] - content[first] >= MOST * n
        parts.append((hashes[chosen], first[chosen]))
    hashes, first = map(np.concatenate, zip(*parts))
    return hashes, first


def build_index(paths: list[str], form: str = "NFC") -> EvaluationIndex:
    """Read evaluation files (.jsonl, .gz, .xz; any keys: all strings but labels such as "subject"
    count).

    form: the Unicode normal form of the texts that will be searched. Files do not hide each other's
    items: with a copy or a variant beside it a benchmark is found as it is alone.
    """
    places, short, hashes, owners = [], 0, [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
    for path in paths:
        file_hashes, file_owners, line_nos, file_short = _index_file(path, form)
        hashes.append(file_hashes)
        owners.append(file_owners + len(places))
        places += [f"{Path(path).name}:{line_no}" for line_no in line_nos]
        short += file_short
    unique, first = np.unique(np.concatenate(hashes), return_index=True)
    coarse = np.zeros(1 << FILTER_BITS, bool)
    coarse[unique >> np.uint64(64 - FILTER_BITS)] = True
    return EvaluationIndex(unique, np.concatenate(owners)[first], places, short, coarse)


def _index_file(path: str, form: str) -> tuple[np.ndarray, np.ndarray, list[int], int]:
    """Return n-grams that are no phrasing, the first item of each, items' lines, how many short."""
    line_nos, hashes, owners = [], [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
    items = _distinct_items(path, form)
    while part := list(islice(items, ROWS_AT_A_TIME)):
        tokens = tokenize([text for _, text in part])
        part_hashes, first = content_ngrams(tokens)
        hashes.append(part_hashes)
        owners.append(tokens.text[first] + len(line_nos))
        line_nos += [line_no for line_no, _ in part]
    owner = np.concatenate(owners)
    pairs = np.unique(np.stack([np.concatenate(hashes), owner.astype(np.uint64)]), axis=1)
    unique, start, shared_by = np.unique(pairs[0], return_index=True, return_counts=True)
    rare = shared_by < SHARED
    return (
        unique[rare],
        pairs[1][start[rare]].astype(np.int64),
        line_nos,
        len(line_nos) - len(np.unique(owner)),
    )


def _distinct_items(path: str, form: str) -> Iterator[tuple[int, str]]:
    """Yield (line number, text) of each item that is no copy: three copies are not three items."""
    seen = set()
    for line_no, row in read_rows(path):
        content = {key: value for key, value in row.items() if key not in LABELS}
        text = "\n".join(all_strings(normalize_row(content, form)))
        if (key := text_key(text)) not in seen:
            seen.add(key)
            yield line_no, text

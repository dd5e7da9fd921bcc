"""The verdict on every row of a corpus: the findings of a process about a block of lines, and the
rows that repeat others.

clean_corpus.py runs this on one machine, clean_ray.py on a cluster.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from dataset.files.jsonl import FOREIGN_BYTES, iter_lines, parse_row
from dataset.prepare import near_duplicates as near
from dataset.prepare.cleaning import (
    Limits,
    check_readable,
    judge,
    normalize_row,
    row_answers,
    row_text,
    text_key,
)
from dataset.prepare.contamination import EvaluationIndex
from dataset.prepare.text_tokens import Tokens, tokenize

REASONS = (
    "",
    "bad_row",
    "too_short",
    "too_long",
    "replacement_characters",
    "few_letters",
    "repeated_lines",
    "top_ngram",
    "repeated_ngrams",
    "contaminated",
    "exact_duplicate",
    "near_duplicate",
)
CODES = {reason: code for code, reason in enumerate(REASONS)}
BLOCK_CHARS = 200_000
FILE_SHIFT = 40  # a row's place is file << FILE_SHIFT | line, so places are in reading order


@dataclass(frozen=True)
class CleanOptions:
    """The steps of cleaning. threshold: Jaccard similarity of near-duplicates, 0: keep them all.

    numbers: whether rows with different numbers are different whatever else they share ("yes",
    "no", "auto": in all rows but running text); a hundred word problems of one template are no
    duplicates. engine: "local" or "ray".
    """

    limits: Limits = Limits()
    form: str = "NFC"
    exact: bool = True
    threshold: float = 0.8
    numbers: str = "auto"
    engine: str = "local"

    def check(self) -> None:
        """ValueError for a threshold out of range, or an option that nothing would heed."""
        self.limits.check()
        if self.threshold and not 0.3 <= self.threshold <= 1:
            raise ValueError(
                f"--threshold {self.threshold}: give a similarity from 0.3 to 1, or 0 to keep "
                "near-duplicates"
            )
        if not self.threshold and self.numbers != "auto":
            raise ValueError(
                f"--numbers {self.numbers}: it is for near-duplicates, which --threshold 0 keeps. "
                "Leave one of the two out."
            )


class LineBlock(NamedTuple):
    """Some lines of a file: one process works on them at a time."""

    path: str
    file_index: int
    lines: list[tuple[int, str]]


class Analysis(NamedTuple):
    """The findings of the first pass about R rows of a block."""

    place: np.ndarray  # int64 [R]
    size: np.ndarray  # int64 [R], bytes of the line
    reason: np.ndarray  # uint8 [R], index into REASONS
    key: np.ndarray  # uint64 [R, 2], equal where the text is
    signature: np.ndarray  # uint32 [R, K + 2 * ANSWER_HASHES]
    bands: np.ndarray  # uint64 [R, b]
    details: dict[int, str]  # place -> explanation


def analyze_block(
    block: LineBlock, options: CleanOptions, index: EvaluationIndex | None = None
) -> Analysis:
    """Judge the rows of a block by themselves."""
    rows, texts, details = [], [], {}
    place = np.array(
        [block.file_index << FILE_SHIFT | line_no for line_no, _ in block.lines], np.int64
    )
    for at, (_, line) in zip(place.tolist(), block.lines, strict=True):
        try:
            row = normalize_row(parse_row(line), options.form)
            check_readable(row)
        except (ValueError, RecursionError) as error:
            row, details[at] = None, str(error)
        rows.append(row)
        texts.append("" if row is None else row_text(row))
    is_document = np.array([row is not None and "text" in row for row in rows])
    tokens = tokenize(texts)
    reasons = judge(texts, is_document, tokens, options.limits)
    reason = np.array(
        [CODES["bad_row"] if row is None else CODES[why] for row, why in zip(rows, reasons)],
        np.uint8,
    )
    if index is not None:
        items = index.find(tokens)
        for i in np.flatnonzero((items >= 0) & (reason == 0)):
            reason[i] = CODES["contaminated"]
            details[int(place[i])] = f"shares text with {index.places[items[i]]}"
    size = np.array(
        [len(line.encode("utf-8", FOREIGN_BYTES)) + 1 for _, line in block.lines], np.int64
    )
    key = np.frombuffer(b"".join(map(text_key, texts)), np.uint64).reshape(-1, 2)
    signature, bands = _signatures(tokens, rows, is_document, options)
    return Analysis(place, size, reason, key, signature, bands, details)


def _signatures(
    tokens: Tokens, rows: list, is_document: np.ndarray, options: CleanOptions
) -> tuple[np.ndarray, np.ndarray]:
    count = len(rows)
    if not options.threshold:
        return np.zeros((count, 0), np.uint32), np.zeros((count, 0), np.uint64)
    matter = {"yes": np.ones(count, bool), "no": np.zeros(count, bool), "auto": ~is_document}
    numbers = near.number_hashes(tokens) * matter[options.numbers]
    answers = zip(*(("", "") if row is None else row_answers(row) for row in rows), strict=True)
    of_answers = [near.signatures(tokenize(list(text)), near.ANSWER_HASHES) for text in answers]
    signature = np.hstack([near.signatures(tokens), *of_answers])
    bands, rows_per_band = near.bands_for(options.threshold)
    return signature, near.band_keys(signature, numbers, bands, rows_per_band)


@dataclass
class Verdicts:
    """The fate of all R rows, in reading order; see Analysis."""

    place: np.ndarray
    size: np.ndarray
    reason: np.ndarray
    original: np.ndarray  # int64 [R], the place of the row that a duplicate repeats, else -1
    details: dict[int, str] = field(default_factory=dict)


def iter_blocks(paths: list[str], first: int = 0) -> Iterator[LineBlock]:
    """Yield the lines of files, some BLOCK_CHARS at a time; blocks never depend on the number of
    processes.

    first: the index of the first of these files in the corpus.
    """
    for file_index, path in enumerate(paths, start=first):
        lines, chars = [], 0
        for line_no, line in iter_lines(path):
            lines.append((line_no, line))
            chars += len(line)
            if chars >= BLOCK_CHARS:
                yield LineBlock(str(path), file_index, lines)
                lines, chars = [], 0
        if lines:
            yield LineBlock(str(path), file_index, lines)


def drop_near_duplicates(verdicts: Verdicts, parents: near.Parents) -> None:
    """Drop every row of a cluster but the first."""
    roots = parents.roots()
    again = np.flatnonzero((roots != np.arange(len(roots))) & (verdicts.reason == 0))
    drop_repeats(verdicts, again, roots[again], "near_duplicate")


def drop_repeats(verdicts: Verdicts, rows: np.ndarray, originals: np.ndarray, reason: str) -> None:
    """Drop rows because they repeat others, which are given by index."""
    verdicts.reason[rows] = CODES[reason]
    verdicts.original[rows] = verdicts.place[originals]

"""Clean whole corpora: judge every row, find duplicates across all files, write what is left and say why the rest went.

Two passes over the files, which are never held in memory. The first one judges rows in all cores and keeps of each a
hash and a MinHash signature, in a temporary folder beside the output (969 bytes a row at the default threshold; some
60 bytes a row in memory while duplicates are sought). The second one writes. Rows are handled in their order, so
the result does not depend on the number of processes. clean_ray.py runs the first pass on a cluster.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from dataset import near_duplicates as near
from dataset.cleaning import Limits, check_readable, judge, normalize_row, row_answers, row_text, text_key
from dataset.contamination import EvaluationIndex
from dataset.jsonl import dump_row, iter_lines, parse_row
from dataset.outputs import check_outputs, scratch_folder, whole_file
from dataset.processes import WorkerPool
from dataset.text_tokens import tokenize

REASONS = ("", "bad_row", "too_short", "too_long", "replacement_characters", "few_letters", "repeated_lines", "top_ngram",
           "repeated_ngrams", "contaminated", "exact_duplicate", "near_duplicate")
CODES = {reason: code for code, reason in enumerate(REASONS)}
BLOCK_CHARS = 200_000
FILE_SHIFT = 40  # a row's place is file << FILE_SHIFT | line, so places are in reading order
NAMED = 3


@dataclass(frozen=True)
class CleanOptions:
    """What to do. threshold: Jaccard similarity of near-duplicates, 0: do not look for them.

    numbers: whether rows with different numbers are different whatever else they share ("yes", "no", "auto": in all
    rows but running text); a hundred word problems of one template are no duplicates.
    """

    limits: Limits = Limits()
    form: str = "NFC"
    exact: bool = True
    threshold: float = 0.8
    numbers: str = "auto"

    def check(self) -> None:
        """ValueError for a threshold out of range, or an option that nothing would heed."""
        self.limits.check()
        if self.threshold and not 0.3 <= self.threshold <= 1:
            raise ValueError(f"--threshold {self.threshold}: give a similarity from 0.3 to 1, or 0 to keep near-duplicates")
        if not self.threshold and self.numbers != "auto":
            raise ValueError(f"--numbers {self.numbers}: it is for near-duplicates, which --threshold 0 keeps. Leave one of the "
                             "two out.")


class LineBlock(NamedTuple):
    """Some lines of a file: what one process works on at a time."""

    path: str
    file_index: int
    lines: list[tuple[int, str]]


class Analysis(NamedTuple):
    """What the first pass finds out about R rows of a block."""

    place: np.ndarray  # int64 [R]
    size: np.ndarray  # int64 [R], bytes of the line
    reason: np.ndarray  # uint8 [R], index into REASONS
    key: np.ndarray  # uint64 [R, 2], equal where the text is
    signature: np.ndarray  # uint32 [R, K + 2 * ANSWER_HASHES]
    bands: np.ndarray  # uint64 [R, b]
    details: dict[int, str]  # place -> what more there is to say


class Analyzer:
    """Callable that judges a block of lines by itself; pickles."""

    def __init__(self, options: CleanOptions, index: EvaluationIndex | None = None):
        self.options, self.index = options, index

    def __call__(self, block: LineBlock) -> Analysis:
        rows, texts, details = [], [], {}
        place = np.array([block.file_index << FILE_SHIFT | line_no for line_no, _ in block.lines], np.int64)
        for at, (_, line) in zip(place.tolist(), block.lines, strict=True):
            try:
                row = normalize_row(parse_row(line), self.options.form)
                check_readable(row)
            except (ValueError, RecursionError) as error:
                row, details[at] = None, str(error)
            rows.append(row)
            texts.append("" if row is None else row_text(row))
        is_document = np.array([row is not None and "text" in row for row in rows])
        tokens = tokenize(texts)
        reasons = judge(texts, is_document, tokens, self.options.limits)
        reason = np.array([CODES["bad_row"] if row is None else CODES[why] for row, why in zip(rows, reasons)], np.uint8)
        if self.index is not None:
            items = self.index.find(tokens)
            for i in np.flatnonzero((items >= 0) & (reason == 0)):
                reason[i], details[int(place[i])] = CODES["contaminated"], f"shares text with {self.index.places[items[i]]}"
        size = np.array([len(line.encode()) + 1 for _, line in block.lines], np.int64)
        key = np.frombuffer(b"".join(map(text_key, texts)), np.uint64).reshape(-1, 2)
        return Analysis(place, size, reason, key, *self._signatures(tokens, rows, is_document), details)

    def _signatures(self, tokens, rows: list, is_document: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        count = len(rows)
        if not self.options.threshold:
            return np.zeros((count, 0), np.uint32), np.zeros((count, 0), np.uint64)
        matter = {"yes": np.ones(count, bool), "no": np.zeros(count, bool), "auto": ~is_document}
        numbers = near.number_hashes(tokens) * matter[self.options.numbers]
        answers = zip(*(("", "") if row is None else row_answers(row) for row in rows), strict=True)
        signature = np.hstack([near.signatures(tokens)] + [
            near.signatures(tokenize(list(texts)), near.ANSWER_HASHES) for texts in answers])
        return signature, near.band_keys(signature, numbers, *near.bands_for(self.options.threshold))


@dataclass
class Verdicts:
    """The fate of all rows, in reading order: place and size int64 [R], reason uint8 [R], original int64 [R]: the place
    of the row that a duplicate repeats, else -1; details: place -> what more there is to say."""

    place: np.ndarray
    size: np.ndarray
    reason: np.ndarray
    original: np.ndarray
    details: dict[int, str] = field(default_factory=dict)


def iter_blocks(paths: list[str], first: int = 0) -> Iterator[LineBlock]:
    """Yield the lines of files, some BLOCK_CHARS at a time; blocks never depend on the number of processes.

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


def judge_locally(paths: list[str], options: CleanOptions, index: EvaluationIndex | None, scratch: Path,
                  num_proc: int | None) -> Verdicts:
    """First pass on this machine: every row's verdict. scratch: a folder for hashes and signatures."""
    columns = ("place", "size", "reason", "key", "signature")
    details, num_rows = {}, 0
    num_bands = near.bands_for(options.threshold)[0] if options.threshold else 0
    files = {name: open(scratch / name, "wb") for name in [*columns, *(f"band{b}" for b in range(num_bands))]}
    try:
        with WorkerPool(Analyzer(options, index), num_proc) as pool:
            for found in pool.map(iter_blocks(paths), "judging", lambda found: len(found.place)):
                for name in columns:
                    files[name].write(np.ascontiguousarray(getattr(found, name)).tobytes())
                for band in range(num_bands):
                    files[f"band{band}"].write(np.ascontiguousarray(found.bands[:, band]).tobytes())
                details |= found.details
                num_rows += len(found.place)
    finally:
        for file in files.values():
            file.close()
    verdicts = Verdicts(np.fromfile(scratch / "place", np.int64), np.fromfile(scratch / "size", np.int64),
                        np.fromfile(scratch / "reason", np.uint8), np.full(num_rows, -1), details)
    if options.exact:
        _mark_exact(verdicts, np.memmap(scratch / "key", np.uint64, "r").reshape(-1, 2))
    if num_bands:
        signature = np.memmap(scratch / "signature", np.uint32, "r").reshape(num_rows, -1)
        parents, alive = near.Parents(num_rows), np.flatnonzero(verdicts.reason == 0)
        alive = alive[signature[alive, 0] != near.EMPTY]
        for band in tqdm(range(num_bands), "comparing", unit=" bands", disable=None, delay=2):
            members, starts = near.buckets(np.memmap(scratch / f"band{band}", np.uint64, "r")[alive])
            near.link_buckets(alive[members], starts, signature, options.threshold, parents)
        mark_near(verdicts, parents)
    return verdicts


def _mark_exact(verdicts: Verdicts, key: np.ndarray) -> None:
    alive = np.flatnonzero(verdicts.reason == 0)
    low, high = key[alive, 0], key[alive, 1]
    order = np.lexsort((high, low))  # stable: of equal keys the first row comes first
    low, high = low[order], high[order]
    begins = np.concatenate([[True], (low[1:] != low[:-1]) | (high[1:] != high[:-1])])[: len(order)]
    first = alive[order[begins]][np.cumsum(begins) - 1]
    again = ~begins
    mark(verdicts, alive[order[again]], first[again], "exact_duplicate")


def mark_near(verdicts: Verdicts, parents: near.Parents) -> None:
    """Drop every row of a cluster but the first."""
    roots = parents.roots()
    again = np.flatnonzero((roots != np.arange(len(roots))) & (verdicts.reason == 0))
    mark(verdicts, again, roots[again], "near_duplicate")


def mark(verdicts: Verdicts, rows: np.ndarray, originals: np.ndarray, reason: str) -> None:
    """Drop rows because they repeat others, which are given by index."""
    verdicts.reason[rows] = CODES[reason]
    verdicts.original[rows] = verdicts.place[originals]


@dataclass
class Report:
    """What was read, kept and dropped, and why: {reason: {"rows", "bytes", "examples"}}."""

    rows_read: int
    bytes_read: int
    rows_kept: int
    bytes_kept: int
    dropped: dict[str, dict]

    def __str__(self) -> str:
        lines = ["| reason | rows | share | bytes | the first ones |", "|---|---|---|---|---|"]
        for reason, figures in self.dropped.items():
            lines.append(f"| {reason} | {figures['rows']:,} | {figures['rows'] / self.rows_read:.2%} "
                         f"| {figures['bytes']:,} | {'; '.join(figures['examples'])} |")
        lines.append(f"| kept | {self.rows_kept:,} | {self.rows_kept / self.rows_read:.2%} | {self.bytes_kept:,} "
                     f"| of {self.rows_read:,} rows, {self.bytes_read:,} bytes |")
        return "\n".join(lines)


def describe(verdicts: Verdicts, row: int, paths: list[str]) -> str:
    """Return "file:line", and what the row repeats or what is wrong with it."""
    def name(place: int) -> str:
        return f"{Path(paths[place >> FILE_SHIFT]).name}:{place & (1 << FILE_SHIFT) - 1}"

    place, original = int(verdicts.place[row]), int(verdicts.original[row])
    more = f"repeats {name(original)}" if original >= 0 else verdicts.details.get(place, "")
    return f"{name(place)} {more}".rstrip()


def make_report(verdicts: Verdicts, paths: list[str]) -> Report:
    """Count rows and bytes per reason and name the first rows of each."""
    dropped = {}
    for code, reason in enumerate(REASONS[1:], start=1):
        rows = np.flatnonzero(verdicts.reason == code)
        if len(rows):
            dropped[reason] = {"rows": len(rows), "bytes": int(verdicts.size[rows].sum()),
                               "examples": [describe(verdicts, row, paths) for row in rows[:NAMED]]}
    kept = verdicts.reason == 0
    return Report(len(kept), int(verdicts.size.sum()), int(kept.sum()), int(verdicts.size[kept].sum()), dropped)


class Rewriter:
    """Callable that returns the lines of a block in normal form, one string; a line that is in it stays as it is."""

    def __init__(self, form: str):
        self.form = form

    def __call__(self, block: LineBlock) -> str:
        out = []
        for _, line in block.lines:
            row = parse_row(line)
            clean = normalize_row(row, self.form)
            out.append(f"{line}\n" if clean == row else dump_row(clean))
        return "".join(out)


def write_kept(paths: list[str], out: str, verdicts: Verdicts, options: CleanOptions, num_proc: int | None,
               rejected: str = "") -> None:
    """Second pass: write the rows that stay to `out`, and the others with the reason to `rejected`."""
    with (whole_file(out) as kept_file, whole_file(rejected) if rejected else nullcontext() as rejected_file,
          WorkerPool(Rewriter(options.form), num_proc) as pool):
        blocks = _kept_blocks(paths, verdicts, rejected_file)
        for text in pool.map(blocks, "writing", lambda text: text.count("\n"), int((verdicts.reason == 0).sum())):
            kept_file.write(text)


def _kept_blocks(paths: list[str], verdicts: Verdicts, rejected_file) -> Iterator[LineBlock]:
    row = 0
    for block in iter_blocks(paths):
        kept = []
        for line_no, line in block.lines:
            place, size = block.file_index << FILE_SHIFT | line_no, len(line.encode()) + 1
            if row == len(verdicts.place) or (verdicts.place[row], verdicts.size[row]) != (place, size):
                raise ValueError(f"{block.path}:{line_no}: the file has changed while it was cleaned. Start again.")
            if verdicts.reason[row] == 0:
                kept.append((line_no, line))
            elif rejected_file:
                reason = REASONS[verdicts.reason[row]]
                entry = {"reason": reason, "where": describe(verdicts, row, paths)}
                entry["row"] = line if reason == "bad_row" else parse_row(line)
                rejected_file.write(dump_row(entry))
            row += 1
        yield LineBlock(block.path, block.file_index, kept)
    if row < len(verdicts.place):
        raise ValueError(f"{paths[verdicts.place[row] >> FILE_SHIFT]}: the file has lost rows while it was cleaned. Start again.")


def clean(paths: list[str], out: str, options: CleanOptions, index: EvaluationIndex | None = None, rejected: str = "",
          num_proc: int | None = None, engine: str = "local") -> Report:
    """Clean files into one and return the report; see the module. engine: "local" or "ray"."""
    options.check()
    check_outputs(paths, {"--out": out, "--rejected": rejected})
    with scratch_folder(Path(out).parent, ".cleaning-") as scratch:
        if engine == "ray":
            from dataset.clean_ray import judge_on_cluster

            verdicts = judge_on_cluster(paths, options, index)
        else:
            verdicts = judge_locally(paths, options, index, scratch, num_proc)
        write_kept(paths, out, verdicts, options, num_proc, rejected)
    return make_report(verdicts, paths)

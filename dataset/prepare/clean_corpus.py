"""Clean whole corpora: judge every row, find duplicates across all files, write the rest, report
the dropped rows by reason.

Two passes over the files, which are never held in memory. The first one judges rows in all cores
and keeps of each a hash and a MinHash signature, in a temporary folder next to the output (969
bytes a row at the default threshold; some 60 bytes a row in memory while duplicates are sought).
The second one writes. Rows are handled in their order, so the result does not depend on the number
of processes. clean_ray.py runs the first pass on a cluster.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TextIO

import numpy as np
from tqdm import tqdm

from dataset.files.jsonl import FOREIGN_BYTES, dump_row, parse_row
from dataset.files.outputs import check_outputs, scratch_folder, whole_file
from dataset.files.processes import WorkerPool
from dataset.prepare import near_duplicates as near
from dataset.prepare.clean_ray import judge_on_cluster
from dataset.prepare.cleaning import normalize_row
from dataset.prepare.contamination import EvaluationIndex
from dataset.prepare.verdicts import (
    FILE_SHIFT,
    REASONS,
    CleanOptions,
    LineBlock,
    Verdicts,
    analyze_block,
    drop_near_duplicates,
    drop_repeats,
    iter_blocks,
)

NAMED = 3


def judge_locally(
    paths: list[str],
    options: CleanOptions,
    index: EvaluationIndex | None,
    scratch: Path,
    num_proc: int | None,
) -> Verdicts:
    """First pass on this machine: every row's verdict. scratch: folder of hashes and signatures."""
    columns = ("place", "size", "reason", "key", "signature")
    details, num_rows = {}, 0
    num_bands = near.bands_for(options.threshold)[0] if options.threshold else 0
    files = {
        name: open(scratch / name, "wb")
        for name in [*columns, *(f"band{b}" for b in range(num_bands))]
    }
    try:
        with WorkerPool(partial(analyze_block, options=options, index=index), num_proc) as pool:
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
    verdicts = Verdicts(
        np.fromfile(scratch / "place", np.int64),
        np.fromfile(scratch / "size", np.int64),
        np.fromfile(scratch / "reason", np.uint8),
        np.full(num_rows, -1),
        details,
    )
    if options.exact:
        _drop_exact_duplicates(verdicts, np.memmap(scratch / "key", np.uint64, "r").reshape(-1, 2))
    if num_bands:
        signature = np.memmap(scratch / "signature", np.uint32, "r").reshape(num_rows, -1)
        parents, alive = near.Parents(num_rows), np.flatnonzero(verdicts.reason == 0)
        alive = alive[signature[alive, 0] != near.EMPTY]
        for band in tqdm(range(num_bands), "comparing", unit=" bands", disable=None, delay=2):
            members, starts = near.buckets(
                np.memmap(scratch / f"band{band}", np.uint64, "r")[alive]
            )
            near.link_buckets(alive[members], starts, signature, options.threshold, parents)
        drop_near_duplicates(verdicts, parents)
    return verdicts


def _drop_exact_duplicates(verdicts: Verdicts, key: np.ndarray) -> None:
    alive = np.flatnonzero(verdicts.reason == 0)
    again, first = near.repeats(key[alive, 0], key[alive, 1])
    drop_repeats(verdicts, alive[again], alive[first], "exact_duplicate")


@dataclass
class Report:
    """Rows that were read, kept and dropped, by reason: {reason: {"rows", "bytes", "examples"}}."""

    rows_read: int
    bytes_read: int
    rows_kept: int
    bytes_kept: int
    dropped: dict[str, dict]

    def __str__(self) -> str:
        lines = ["| reason | rows | ratio | bytes | the first ones |", "|---|---|---|---|---|"]
        for reason, counts in self.dropped.items():
            lines.append(
                f"| {reason} | {counts['rows']:,} | {counts['rows'] / self.rows_read:.2%} "
                f"| {counts['bytes']:,} | {'; '.join(counts['examples'])} |"
            )
        lines.append(
            f"| kept | {self.rows_kept:,} | {self.rows_kept / self.rows_read:.2%} "
            f"| {self.bytes_kept:,} | of {self.rows_read:,} rows, {self.bytes_read:,} bytes |"
        )
        return "\n".join(lines)


def describe(verdicts: Verdicts, row: int, paths: list[str]) -> str:
    """Return "file:line", and the row that this one repeats, or its fault."""

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
            dropped[reason] = {
                "rows": len(rows),
                "bytes": int(verdicts.size[rows].sum()),
                "examples": [describe(verdicts, row, paths) for row in rows[:NAMED]],
            }
    kept = verdicts.reason == 0
    return Report(
        len(kept),
        int(verdicts.size.sum()),
        int(kept.sum()),
        int(verdicts.size[kept].sum()),
        dropped,
    )


def rewrite_block(block: LineBlock, form: str) -> str:
    """Return the lines of a block in normal form; a line that is in it stays as it is."""
    out = []
    for _, line in block.lines:
        row = parse_row(line)
        clean = normalize_row(row, form)
        out.append(f"{line}\n" if clean == row else dump_row(clean))
    return "".join(out)


def write_kept(
    paths: list[str],
    out: str,
    verdicts: Verdicts,
    options: CleanOptions,
    num_proc: int | None,
    rejected: str = "",
) -> None:
    """Second pass: write the kept rows to `out`, and the others with the reason to `rejected`."""
    with (
        whole_file(out) as kept_file,
        whole_file(rejected) if rejected else nullcontext() as rejected_file,
        WorkerPool(partial(rewrite_block, form=options.form), num_proc) as pool,
    ):
        blocks, num_kept = (
            _kept_blocks(paths, verdicts, rejected_file),
            np.sum(verdicts.reason == 0),
        )
        for text in pool.map(blocks, "writing", lambda text: text.count("\n"), int(num_kept)):
            kept_file.write(text)


def _kept_blocks(
    paths: list[str], verdicts: Verdicts, rejected_file: TextIO | None
) -> Iterator[LineBlock]:
    row = 0
    for block in iter_blocks(paths):
        kept = []
        for line_no, line in block.lines:
            now = (
                block.file_index << FILE_SHIFT | line_no,
                len(line.encode("utf-8", FOREIGN_BYTES)) + 1,
            )
            if row == len(verdicts.place) or now != (verdicts.place[row], verdicts.size[row]):
                raise ValueError(
                    f"{block.path}:{line_no}: the file has changed while it was cleaned. Start "
                    "again."
                )
            if verdicts.reason[row] == 0:
                kept.append((line_no, line))
            elif rejected_file:
                reason = REASONS[verdicts.reason[row]]
                entry = {"reason": reason, "where": describe(verdicts, row, paths)}
                if reason == "bad_row":  # which may hold bytes that are not UTF-8
                    raw = line.encode("utf-8", FOREIGN_BYTES)
                    entry["row"] = raw.decode("utf-8", "backslashreplace")
                else:
                    entry["row"] = parse_row(line)
                rejected_file.write(dump_row(entry))
            row += 1
        yield LineBlock(block.path, block.file_index, kept)
    if row < len(verdicts.place):
        raise ValueError(
            f"{paths[verdicts.place[row] >> FILE_SHIFT]}: the file has lost rows while it was "
            "cleaned. Start again."
        )


def clean(
    paths: list[str],
    out: str,
    options: CleanOptions,
    index: EvaluationIndex | None = None,
    rejected: str = "",
    num_proc: int | None = None,
) -> Report:
    """Clean files into one and return the report; see the module."""
    options.check()
    check_outputs(paths, {"--out": out, "--rejected": rejected})
    with scratch_folder(Path(out).parent, ".cleaning-") as scratch:
        if options.engine == "ray":
            verdicts = judge_on_cluster(paths, options, index)
        else:
            verdicts = judge_locally(paths, options, index, scratch, num_proc)
        write_kept(paths, out, verdicts, options, num_proc, rejected)
    return make_report(verdicts, paths)

"""Datasets of token sequences: rows of files -> encoder -> cache -> sequences with labels.

`TokenDataset` does everything but the encoding of a row, which a `RowEncoder` does: lm_dataset.py
and pair_dataset.py have those of the stages.
"""

from __future__ import annotations

import copy
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dataset.chat.format import check_answers, check_conversation, normalize_conversation
from dataset.chat.spellings import WEIGHTS, read_messages
from dataset.files.hashes import fingerprint, hash64, remembered_sha256, scramble, tokenizer_sha256
from dataset.files.jsonl import find_shards, in_fraction, iter_lines, parse_row
from dataset.files.outputs import locked, why_unwritable
from dataset.files.processes import WorkerPool
from dataset.packing import IGNORE
from dataset.token_cache import BUILDING, EncodedBlock, LineBlock, Report, TokenTable, open_or_build

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# raise it when the same row gives other sequences than before: old caches are then left alone
FORMAT_VERSION = 4
# before: it learned other spellings as text and refused fewer rows. Where the report has neither
# such rows nor skipped ones, its sequences are the same, and its runs resume
FORMER_VERSION = 2
# of our tokenizer and of those that public data is formatted for
SPECIAL = re.compile(
    r"<\|\w+\|>|</?s>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|<functioncall>"
    r"|</?(?:tool_call|tool_response|think|thinking|reasoning)>"
)
BLOCK_ROWS, BLOCK_CHARS = 1000, 1_000_000  # a block is full when either is reached
BAD_ROWS = ("stop", "skip")
DEFAULT_CACHE = Path(__file__).with_name("cache")

TokenSequence = tuple[np.ndarray, np.ndarray]


def token_byte_lengths(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Bytes of text that each token stands for, int64 [V]; 0 for the added tokens, which stand for
    no text.

    Holds for byte-level vocabularies, where each character of a token's spelling is one byte.
    Summed over the targets it is the denominator of bits per byte.
    """
    added = set(tokenizer.get_added_vocab().values())
    spellings = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    return np.array([0 if i in added else len(spelling) for i, spelling in enumerate(spellings)])


def check_no_tools(row: dict) -> None:
    """ValueError if a row has tools or a system prompt next to its conversation."""
    for key in ("tools", "system"):
        if row.get(key) not in (None, "", [], "[]"):
            raise ValueError(
                f'"{key}" next to the conversation. `python dataset/prepare_data.py convert` puts '
                "it on the system message."
            )


class RowEncoder(ABC):
    """Turn blocks of lines into token sequences; a subclass encodes a single row."""

    stores_targets = True  # False where every token but the first of a sequence is one

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, max_seq_len: int, bad_rows: str = "stop"
    ):
        if bad_rows not in BAD_ROWS:
            raise ValueError(f"bad_rows is {bad_rows!r}. Give one of {', '.join(BAD_ROWS)}.")
        if max_seq_len < 2:
            raise ValueError(
                f"max_seq_len is {max_seq_len}. Give 2 or more: a sequence predicts its tokens "
                "after the first."
            )
        self.tokenizer, self.max_seq_len, self.bad_rows = tokenizer, max_seq_len, bad_rows
        self.id_dtype = np.uint16 if len(tokenizer) <= 1 << 16 else np.int32
        self.byte_lengths = token_byte_lengths(tokenizer)
        self.notes: dict[str, str] = {}  # about the row in work: {kind: what}

    def options(self) -> dict:
        """The encoder's own options, for the fingerprint: a renamed key orphans caches and runs."""
        return {}

    @abstractmethod
    def encode_row(
        self, row: dict, where: str, draw_key: int, report: Report
    ) -> list[TokenSequence]:
        """Return the sequences (input_ids [n], is_target [n]) of a row; ValueError "what is wrong.
        fix".

        `draw_key` is a hash of the row's text, for random draws: file and line do not matter.
        """

    def read(self, messages: Any) -> list[dict]:
        """A row's messages in our form (see dataset/chat/spellings.py), with notes for the report.

        ValueError "what is wrong. fix".
        """
        found = read_messages(messages)
        check_conversation(found)
        check_answers(found)
        plain = [{k: x for k, x in one.items() if k not in WEIGHTS} for one in messages]
        if normalize_conversation(found) != normalize_conversation(plain):
            self.notes["respelled"] = ""
        texts = (message.get(key) for message in found for key in ("content", "reasoning_content"))
        self.note_special("\n".join(filter(None, texts)))
        return found

    def note_special(self, text: str) -> None:
        """Note a text that spells special tokens: its data may be formatted already."""
        if match := SPECIAL.search(text):
            self.notes["special"] = f" ({match[0]})"

    def __call__(self, block: LineBlock) -> EncodedBlock:
        report, sequences, documents = Report(), [], []
        for line_no, line in block.lines:
            where = f"{block.path}:{line_no}"
            report.rows_read += 1
            self.notes = {}
            try:
                row, line_hash = parse_row(line), hash64(line.encode())
                found = self.encode_row(row, where, line_hash, report)
            except ValueError as error:
                if self.bad_rows == "stop":
                    raise ValueError(f"{where}: {error}") from error
                report.note("skipped", f"{where} ({str(error).split('. ')[0]})")
                continue
            report.rows_used += bool(found)
            for kind, what in self.notes.items():
                report.note(kind, where + what)
            sequences += found
            documents += [line_hash] * len(found)
        return self.gather(sequences, documents, report)

    def gather(
        self, sequences: list[TokenSequence], documents: list[int], report: Report
    ) -> EncodedBlock:
        """Lay the sequences of a block end to end and complete its report."""
        lengths = np.array([len(ids) for ids, _ in sequences], dtype=np.int64)
        nothing = (np.empty(0, self.id_dtype), np.empty(0, bool))
        input_ids, is_target = (np.concatenate(parts) for parts in zip(nothing, *sequences))
        report.sequences, report.tokens = len(lengths), len(input_ids)
        report.targets = int(is_target.sum())
        report.target_bytes = int(self.byte_lengths[input_ids[is_target]].sum())
        columns = {"input_ids": input_ids}
        if self.stores_targets:  # as bytes: Arrow packs booleans into bits, which numpy cannot map
            columns["is_target"] = is_target.view(np.uint8)
        return EncodedBlock(columns, lengths, np.array(documents, dtype=np.uint64), report)


class TokenDataset:
    """Sequences of token ids with their labels, read from caches, one for each file, that the first
    use builds.

    `dataset[i]` is `{"input_ids": int64 [n], "labels": int64 [n]}`, n <= max_seq_len; labels are
    not shifted, those that are not trained are -100, the first always is. `lengths` int32 [N];
    `report` counts the rows by their fate; `fingerprint` names the content. A path is a file, a
    folder or a glob; with `@0.4` at its end that fraction of its rows is used, always the same.

    Further options go to the encoder: bad_rows, and those of the stage. ValueError
    `path:line: what is wrong. fix` at a faulty row, unless bad_rows is "skip".
    """

    encoder_type: type[RowEncoder]

    def __init__(
        self,
        data_path: str | Path | list[str],
        tokenizer: PreTrainedTokenizerBase,
        max_seq_len: int,
        *,
        cache_dir: str | Path | None = None,
        num_proc: int | None = None,
        **options,
    ):
        encoder = self.encoder_type(tokenizer, max_seq_len, **options)
        self.max_seq_len = max_seq_len
        sources, cache_dir = find_shards(data_path), Path(cache_dir or DEFAULT_CACHE)
        problem = why_unwritable(cache_dir)  # of no concern where all is cached
        memory = None if problem else cache_dir / "file_hashes"
        hashes = [remembered_sha256(path, memory) for path, _ in sources]
        names = _cache_names(encoder, sources, hashes, FORMAT_VERSION)
        folders = [cache_dir / name for name in names]
        is_cached = all(map(Path.exists, folders))
        if problem and not is_cached:
            raise ValueError(
                f"no place for the token cache: {problem}. Choose another --cache_dir than "
                f"{cache_dir}."
            )
        lock = cache_dir / fingerprint(caches=names)
        one_builds = nullcontext() if is_cached else locked(lock, BUILDING)
        with one_builds, WorkerPool(encoder, num_proc) as pool:
            for folder, source in zip(folders, sources, strict=True):
                _open_or_encode(folder, pool, *source)
        self.table = TokenTable(*folders)
        self.report, self.lengths = self.table.report, self.table.lengths
        if not self.report.rows_respelled and not self.report.rows_skipped:
            names = _cache_names(encoder, sources, hashes, FORMER_VERSION)
        self.fingerprint = fingerprint(caches=names)
        if not len(self.table):
            raise ValueError(
                f"no sequence to train on.\n{self.report}\nGive data with targets, or a larger "
                "max_seq_len."
            )
        # of the table: a view of a split has some of them
        self.rows = np.arange(len(self.table), dtype=np.uint32)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        row = self.rows[index]
        input_ids = self.table["input_ids", row].astype(np.int64)
        labels = input_ids.copy()
        if "is_target" in self.table:
            labels[self.table["is_target", row] == 0] = IGNORE
        labels[0] = IGNORE
        return {"input_ids": input_ids, "labels": labels}

    def held_out_split(
        self, ratio: float, seed: int = 0, max_rows: int | None = None
    ) -> tuple[TokenDataset, TokenDataset]:
        """Return (training view, validation view): `ratio` of the documents, at most `max_rows`,
        are held out.

        A hash of each row's text decides, so duplicates and all windows of a document fall on the
        same side, wherever they stand. Both views are datasets like this one; their `report` is of
        the whole.
        """
        if not 0 < ratio < 1:
            raise ValueError(f"the ratio to hold out is {ratio}. Give one between 0 and 1.")
        if max_rows is not None and max_rows < 1:
            raise ValueError(f"max_rows is {max_rows}. Hold out at least one row, or do not split.")
        salt = np.uint64(hash64(f"held out {seed}".encode()))
        draws = scramble(self.table.documents[self.rows] ^ salt)
        # in ascending order; one for each document, since scrambling loses nothing
        unique = np.unique(draws)
        if len(unique) < 2:
            raise ValueError(
                "one document cannot be split. Give more data, a validation file of its own, or "
                "--val_ratio 0."
            )
        count = min(max(1, round(ratio * len(unique))), len(unique) - 1)
        count = min(count, max_rows or count)
        held_out = draws <= unique[count - 1]
        name = f"{ratio}:{seed}:{max_rows}"
        return self._view(~held_out, f"train:{name}"), self._view(held_out, f"held_out:{name}")

    def _view(self, keep: np.ndarray, name: str) -> TokenDataset:
        view = copy.copy(self)
        view.rows, view.lengths = self.rows[keep], self.lengths[keep]
        view.fingerprint = fingerprint(whole=self.fingerprint, view=name)
        return view


def _cache_names(
    encoder: RowEncoder, sources: list[tuple[str, float]], hashes: list[str], version: int
) -> list[str]:
    common = dict(
        format=version,
        encoder=type(encoder).__name__,
        max_seq_len=encoder.max_seq_len,
        tokenizer=tokenizer_sha256(encoder.tokenizer),
        bad_rows=encoder.bad_rows,
        **encoder.options(),
    )
    # the key is "share" for the sake of caches that are there already
    return [
        fingerprint(**common, file=sha256, share=fraction)
        for sha256, (_, fraction) in zip(hashes, sources)
    ]


def _open_or_encode(folder: Path, pool: WorkerPool, path: str, fraction: float) -> TokenTable:
    return open_or_build(
        folder,
        lambda: pool.map(
            line_blocks(path, fraction),
            f"text to tokens {Path(path).name}",
            lambda block: block.report.rows_read,
            count_rows(path, fraction),
        ),
    )


def line_blocks(path: str, fraction: float) -> Iterator[LineBlock]:
    """Yield the lines of a fraction of a file, one full block after the other."""
    lines, size = [], 0
    for line_no, line in iter_lines(path):
        if not in_fraction(line_no, fraction):
            continue
        lines.append((line_no, line))
        size += len(line)
        if len(lines) >= BLOCK_ROWS or size >= BLOCK_CHARS:
            yield LineBlock(path, lines)
            lines, size = [], 0
    yield LineBlock(path, lines)


def count_rows(path: str, fraction: float) -> int | None:
    """Estimate the rows for the progress bar; None where counting would mean to decompress."""
    if not path.endswith(".jsonl"):
        return None
    with open(path, "rb") as file:
        chunks = iter(lambda: file.read(1 << 20), b"")
        return round(fraction * sum(chunk.count(b"\n") for chunk in chunks))

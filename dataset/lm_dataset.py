"""Datasets of token sequences for the stages that learn from text: pretraining and supervised fine-tuning.

Look at what a stage is trained on, as text, with the trained tokens in colour:

    python dataset/lm_dataset.py --inspect my_data.jsonl --rows 3
"""

from __future__ import annotations

import copy
import hashlib
import random
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from dataset import token_cache
from dataset.chat_format import check_conversation, encode_conversation, plain_encoder
from dataset.jsonl import find_shards, in_share, iter_lines, parse_row
from dataset.outputs import locked, why_unwritable
from dataset.packing import IGNORE
from dataset.processes import WorkerPool
from dataset.text_tokens import scramble
from dataset.token_cache import BUILDING, EncodedBlock, LineBlock, Report, TokenTable

FORMAT_VERSION = 2  # raise it when the same row gives other sequences than before: old caches are then left alone
BLOCK_ROWS, BLOCK_CHARS = 1000, 1_000_000  # a block is full when either is reached
BAD_ROWS = ("stop", "skip")
DEFAULT_CACHE = ROOT / "dataset" / "cache"
SYSTEM_PROMPTS = {
    "zh": ("你是一个乐于助人的助手。", "你是一个可靠的助手，回答准确、简洁。", "请认真阅读问题，给出清楚的回答。",
           "你是一名友好的助手，不知道的事情会直接说不知道。"),
    "en": ("You are a helpful assistant.", "You are a reliable assistant. Answer precisely and briefly.",
           "Read the question with care and give a clear answer.",
           "You are a friendly assistant who says so when something is unknown."),
}


def token_byte_lengths(tokenizer) -> torch.Tensor:
    """Bytes of text that each token stands for, int64 [V]; 0 for the added tokens, which stand for no text.

    Holds for byte-level vocabularies, where each character of a token's spelling is one byte. Summed over the targets
    it is the denominator of bits per byte.
    """
    added = set(tokenizer.get_added_vocab().values())
    spellings = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    return torch.tensor([0 if i in added else len(spelling) for i, spelling in enumerate(spellings)])


class RowEncoder(ABC):
    """Turn blocks of lines into token sequences; a subclass says what one row becomes."""

    stores_targets = True  # False where every token but the first of a sequence is one

    def __init__(self, tokenizer, max_seq_len: int, bad_rows: str):
        self.tokenizer, self.max_seq_len, self.bad_rows = tokenizer, max_seq_len, bad_rows
        self.id_dtype = np.uint16 if len(tokenizer) <= 1 << 16 else np.int32
        self.byte_lengths = token_byte_lengths(tokenizer).numpy()

    @abstractmethod
    def encode_row(self, row: dict, where: str, draw_key: int, report: Report) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return the sequences (input_ids [n], is_target [n]) of a row; ValueError "what is wrong. way out".

        `draw_key` says the row's text, for what is drawn: then it does not matter in which file it stands, and where.
        """

    def __call__(self, block: LineBlock) -> EncodedBlock:
        report, sequences, documents = Report(), [], []
        for line_no, line in block.lines:
            where, line_hash = f"{block.path}:{line_no}", _line_hash(line)
            report.rows_read += 1
            try:
                found = self.encode_row(parse_row(line), where, line_hash, report)
            except ValueError as error:
                if self.bad_rows == "stop":
                    raise ValueError(f"{where}: {error}") from error
                report.note("skipped", f"{where} ({str(error).split('. ')[0]})")
                continue
            report.rows_used += bool(found)
            sequences += found
            documents += [line_hash] * len(found)
        return self._gather(sequences, documents, report)

    def _gather(self, sequences, documents, report: Report) -> EncodedBlock:
        lengths = np.array([len(ids) for ids, _ in sequences], dtype=np.int64)
        nothing = (np.empty(0, self.id_dtype), np.empty(0, bool))
        input_ids, is_target = (np.concatenate(parts) for parts in zip(nothing, *sequences))
        report.sequences, report.tokens = len(lengths), len(input_ids)
        report.targets = int(is_target.sum())
        report.target_bytes = int(self.byte_lengths[input_ids[is_target]].sum())
        columns = {"input_ids": input_ids}
        if self.stores_targets:
            columns["is_target"] = is_target.view(np.uint8)  # Arrow packs booleans into bits, which numpy cannot map
        return EncodedBlock(columns, lengths, np.array(documents, dtype=np.uint64), report)


def _line_hash(line: str) -> int:
    return int.from_bytes(hashlib.blake2b(line.encode(), digest_size=8).digest(), "little")


class PretrainEncoder(RowEncoder):
    """`{"text"}` -> the document between two `<|endoftext|>`, in windows of max_seq_len that share one token.

    The shared token is the last target of one window and the first input of the next, so that every token of a
    document is a target exactly once.
    """

    stores_targets = False

    def __init__(self, tokenizer, max_seq_len: int, bad_rows: str):
        super().__init__(tokenizer, max_seq_len, bad_rows)
        self.plain = plain_encoder(tokenizer)  # what looks like a special token in a document is text
        self.mark = tokenizer.convert_tokens_to_ids("<|endoftext|>")

    def encode_row(self, row, where, draw_key, report):
        if "text" not in row:
            raise ValueError(f'no "text" among the keys {list(row)}. A pretraining row is {{"text": "..."}}.')
        text = row["text"]
        if not isinstance(text, str):
            raise ValueError(f'"text" is of type {type(text).__name__}. Give a string.')
        if not text.strip():
            raise ValueError('"text" is empty. Leave the row out.')
        tokens = self.plain.encode_batch_fast([text])[0].ids  # fast: without the characters' offsets
        ids = np.array([self.mark, *tokens, self.mark], dtype=self.id_dtype)
        step = self.max_seq_len - 1
        windows = [ids[start : start + step + 1] for start in range(0, len(ids) - 1, step)]
        return [(window, np.arange(len(window)) > 0) for window in windows]


class SFTEncoder(RowEncoder):
    """`{"conversations"}` -> the rendered conversation; targets are what the assistant wrote."""

    def __init__(self, tokenizer, max_seq_len: int, bad_rows: str, system_prompt_share: float,
                 empty_think_share: float, seed: int):
        super().__init__(tokenizer, max_seq_len, bad_rows)
        self.system_prompt_share, self.empty_think_share, self.seed = system_prompt_share, empty_think_share, seed

    def encode_row(self, row, where, draw_key, report):
        if "conversations" not in row:
            raise ValueError(f'no "conversations" among the keys {list(row)}. An SFT row is {{"conversations": '
                             '[{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}.')
        check_conversation(row["conversations"])
        input_ids, is_target = encode_conversation(self.tokenizer, self.augment(row["conversations"], draw_key))
        cut = len(input_ids) > self.max_seq_len
        input_ids = np.array(input_ids[: self.max_seq_len], dtype=self.id_dtype)
        is_target = np.array(is_target[: self.max_seq_len])
        is_target[0] = False
        if not is_target.any():
            report.note("no_target", where)
            return []
        if cut:
            report.note("cut", where)
        return [(input_ids, is_target)]

    def augment(self, messages: list[dict], draw_key: int) -> list[dict]:
        """Return the messages, some with a system prompt or an empty think block put in: by (seed, row) alone."""
        draws = random.Random(f"{self.seed}:{draw_key}")
        system, think, which = draws.random(), draws.random(), draws.random()
        if system < self.system_prompt_share and all(message["role"] != "system" for message in messages):
            first = messages[0].get("content") or ""
            prompts = SYSTEM_PROMPTS["zh" if any("\u4e00" <= char <= "\u9fff" for char in first) else "en"]
            messages = [{"role": "system", "content": prompts[int(which * len(prompts))]}, *messages]
        if think < self.empty_think_share:
            last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=None)
            if last is not None and not _has_reasoning(messages[last]):
                messages = [*messages[:last], {**messages[last], "reasoning_content": ""}, *messages[last + 1 :]]
        return messages


def _has_reasoning(message: dict) -> bool:
    return message.get("reasoning_content") is not None or (message.get("content") or "").startswith("<think>")


class TokenDataset:
    """Sequences of token ids with their labels, read from caches, one for each file, that the first use builds.

    `dataset[i]` is `{"input_ids": int64 [n], "labels": int64 [n]}`, n <= max_seq_len; labels are not shifted, those
    that are not trained are -100, the first always is. `lengths` int32 [N]; `report` says what became of the rows;
    `fingerprint` names the content. A path is a file, a folder or a glob; with `@0.4` at its end that share of the rows
    is used, always the same ones.

    ValueError `path:line: what is wrong. way out` at a faulty row, unless bad_rows is "skip".
    """

    def __init__(self, data_path, encoder: RowEncoder, options: dict, cache_dir, num_proc: int | None):
        if encoder.bad_rows not in BAD_ROWS:
            raise ValueError(f"bad_rows is {encoder.bad_rows!r}. Give one of {', '.join(BAD_ROWS)}.")
        if encoder.max_seq_len < 2:
            raise ValueError(f"max_seq_len is {encoder.max_seq_len}. Give 2 or more: a sequence predicts its tokens "
                             "after the first.")
        self.max_seq_len = encoder.max_seq_len
        sources, cache_dir = find_shards(data_path), Path(cache_dir or DEFAULT_CACHE)
        common = dict(format=FORMAT_VERSION, encoder=type(encoder).__name__, max_seq_len=encoder.max_seq_len,
                      tokenizer=token_cache.tokenizer_sha256(encoder.tokenizer), bad_rows=encoder.bad_rows, **options)
        problem = why_unwritable(cache_dir)  # of no concern where all is cached
        hashes = [token_cache.file_sha256(path, None if problem else cache_dir / "file_hashes") for path, _ in sources]
        names = [token_cache.fingerprint(**common, file=sha256, share=share)
                 for sha256, (_, share) in zip(hashes, sources, strict=True)]
        self.fingerprint = token_cache.fingerprint(caches=names)
        folders = [cache_dir / name for name in names]
        is_cached = all(map(Path.exists, folders))
        if problem and not is_cached:
            raise ValueError(f"no place for the token cache: {problem}. Choose another --cache_dir than {cache_dir}.")
        one_builds = nullcontext() if is_cached else locked(cache_dir / self.fingerprint, BUILDING)
        with one_builds, WorkerPool(encoder, num_proc) as pool:
            tables = [_open_or_encode(folder, pool, *source) for folder, source in zip(folders, sources, strict=True)]
        self._table = TokenTable.join(tables)
        self.report = self._table.report
        if not len(self._table):
            raise ValueError(f"no sequence to train on.\n{self.report}\nGive data with targets, or a larger max_seq_len.")
        self.rows = np.arange(len(self._table), dtype=np.uint32)  # of the table: a view of a split has some of them
        self.lengths = self._table.lengths

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        row = self.rows[index]
        input_ids = self._table["input_ids", row].astype(np.int64)
        labels = input_ids.copy()
        if "is_target" in self._table:
            labels[self._table["is_target", row] == 0] = IGNORE
        labels[0] = IGNORE
        return {"input_ids": input_ids, "labels": labels}

    def held_out_split(self, share: float, seed: int = 0, max_rows: int | None = None):
        """Return (training view, validation view): `share` of the documents, at most `max_rows`, are held out.

        A hash of each row's text decides, so duplicates and all windows of a document fall on the same side, wherever
        they stand. Both views are datasets like this one; their `report` is of the whole.
        """
        if not 0 < share < 1:
            raise ValueError(f"the share to hold out is {share}. Give one between 0 and 1.")
        if max_rows is not None and max_rows < 1:
            raise ValueError(f"max_rows is {max_rows}. Hold out at least one row, or do not split.")
        draws = scramble(self._table.documents[self.rows] ^ np.uint64(_line_hash(f"held out {seed}")))
        unique = np.unique(draws)  # in ascending order; one for each document, since scrambling loses nothing
        if len(unique) < 2:
            raise ValueError("one document cannot be split. Give more data, or a validation file of its own.")
        count = min(max(1, round(share * len(unique))), len(unique) - 1)
        count = min(count, max_rows or count)
        held_out = draws <= unique[count - 1]
        name = f"{share}:{seed}:{max_rows}"
        return self._view(~held_out, f"train:{name}"), self._view(held_out, f"held_out:{name}")

    def _view(self, keep: np.ndarray, name: str):
        view = copy.copy(self)
        view.rows, view.lengths = self.rows[keep], self.lengths[keep]
        view.fingerprint = token_cache.fingerprint(whole=self.fingerprint, view=name)
        return view


class PretrainDataset(TokenDataset):
    """Documents for next-token prediction (see PretrainEncoder, TokenDataset)."""

    def __init__(self, data_path, tokenizer, max_seq_len: int, *, bad_rows: str = "stop", cache_dir=None,
                 num_proc: int | None = None):
        super().__init__(data_path, PretrainEncoder(tokenizer, max_seq_len, bad_rows), {}, cache_dir, num_proc)


class SFTDataset(TokenDataset):
    """Conversations, trained on the assistant's words (see SFTEncoder, TokenDataset).

    `system_prompt_share` of the rows without a system message get one of a short list; in `empty_think_share` of
    those whose last answer has no reasoning, an empty think block stands before it. Both depend on (seed, row) alone.
    """

    def __init__(self, data_path, tokenizer, max_seq_len: int, *, bad_rows: str = "stop", cache_dir=None,
                 num_proc: int | None = None, system_prompt_share: float = 0.0, empty_think_share: float = 0.0,
                 seed: int = 0):
        options = {"system_prompt_share": system_prompt_share, "empty_think_share": empty_think_share}
        for name, share in options.items():
            if not 0 <= share <= 1:
                raise ValueError(f"{name} is {share}. Give a share from 0 to 1.")
        encoder = SFTEncoder(tokenizer, max_seq_len, bad_rows, seed=seed, **options)
        super().__init__(data_path, encoder, {**options, "seed": seed, "prompts": SYSTEM_PROMPTS}, cache_dir, num_proc)


def _open_or_encode(folder: Path, pool: WorkerPool, path: str, share: float) -> TokenTable:
    return token_cache.open_or_build(folder, lambda: pool.map(
        _line_blocks(path, share), f"text to tokens {Path(path).name}", lambda block: block.report.rows_read,
        _count_rows(path, share)))


def _line_blocks(path: str, share: float) -> Iterator[LineBlock]:
    lines, size = [], 0
    for line_no, line in iter_lines(path):
        if share < 1 and not in_share(line_no, share):
            continue
        lines.append((line_no, line))
        size += len(line)
        if len(lines) >= BLOCK_ROWS or size >= BLOCK_CHARS:
            yield LineBlock(path, lines)
            lines, size = [], 0
    yield LineBlock(path, lines)


def _count_rows(path: str, share: float) -> int | None:
    """Estimate the rows for the progress bar; None where counting would mean to decompress."""
    if not path.endswith(".jsonl"):
        return None
    with open(path, "rb") as file:
        return round(share * sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(1 << 20), b"")))


if __name__ == "__main__":
    from dataset.inspect_rows import main

    main()

"""Blocks of lines and their encoder, in a module that worker processes can import."""

import os
import signal

import numpy as np

from dataset.token_cache import EncodedBlock, LineBlock, Report


def encode_block(block: LineBlock) -> EncodedBlock:
    """Encode each line as its characters' codes; "out of memory" kills the process."""
    parts = [np.array([ord(char) for char in line], dtype=np.uint16) for _, line in block.lines]
    if any(line == "out of memory" for _, line in block.lines):
        os.kill(os.getpid(), signal.SIGKILL)
    lengths = np.array([len(part) for part in parts], dtype=np.int64)
    ids = np.concatenate(parts) if parts else np.empty(0, np.uint16)
    report = Report(
        rows_read=len(parts), rows_used=len(parts), sequences=len(parts), tokens=len(ids)
    )
    documents = np.array([line_no for line_no, _ in block.lines], dtype=np.uint64)
    return EncodedBlock({"input_ids": ids}, lengths, documents, report)


def line_blocks(count: int, start: int = 0) -> list[LineBlock]:
    return [
        LineBlock("f.jsonl", [(i, "x" * (i % 5 + 1)), (i, f"line {i}")])
        for i in range(start, start + count)
    ]

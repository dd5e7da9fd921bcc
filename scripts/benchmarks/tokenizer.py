"""How much text a token holds: our tokenizer against others, on held-out Chinese and English rows.

    python scripts/bench.py tokenizer                           # ours alone, on the toy world
    python scripts/bench.py tokenizer --data_path zh.jsonl.xz en.jsonl.xz --tokenizer gpt2=FOLDER
    python scripts/bench.py tokenizer --tokenizer new=out/tokenizer qwen=qwen.tiktoken

Measured is every 50th row of each file, the rows that trainer/train_tokenizer.py leaves out. More
characters per token mean shorter sequences; more entries mean a larger embedding and a slower
output layer.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from scripts.benchmarks.results import BenchArgs, Results
from trainer.runtime.arguments import ROOT, arg

if TYPE_CHECKING:
    from tokenizers import Tokenizer

COLUMNS = "tokenizer entries language rows characters_per_token bytes_per_token"


@dataclass
class Args(BenchArgs):
    data_path: list[str] = arg([], "files of text or chat rows (default: the toy world)", nargs="+")
    tokenizer: list[str] = arg(
        [], "NAME=PATH of others: a tokenizer.json or .tiktoken file, or a folder", nargs="*"
    )

    def check(self) -> None:
        for item in self.tokenizer:
            if "=" not in item:
                fix = f"give NAME=PATH, such as gpt2={item}"
                raise ValueError(f"--tokenizer {item} has no name: {fix}")


def measure(args: Args, results: Results) -> None:
    """A row per tokenizer and language."""
    from trainer.train_tokenizer import held_out_counts, toy_paths

    data_path = args.data_path or toy_paths()
    paths = {"minimind": str(ROOT / "model")} | dict(item.split("=", 1) for item in args.tokenizer)
    for name, path in paths.items():
        tokenizer = load_tokenizer(path)
        for lang, count in sorted(held_out_counts(data_path, tokenizer).items(), reverse=True):
            row = {"tokenizer": name, "entries": tokenizer.get_vocab_size(), "language": lang}
            row |= count
            for unit in ("characters", "bytes"):
                row[f"{unit}_per_token"] = count[unit] / count["tokens"]
            results.add(row)


def load_tokenizer(path: str) -> Tokenizer:
    """Load a tokenizer.json, a folder with one or with GPT-2's two files, or a .tiktoken file."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    found = Path(path)
    if found.suffix == ".tiktoken" and found.is_file():
        return load_tiktoken(found)
    for name in ("tokenizer.json", ""):
        if (found / name).is_file():
            return Tokenizer.from_file(str(found / name))
    for vocab, merges in (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")):
        if (found / vocab).is_file() and (found / merges).is_file():
            tokenizer = Tokenizer(models.BPE.from_file(str(found / vocab), str(found / merges)))
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            return tokenizer
    wanted = "a tokenizer.json, a .tiktoken file, or a folder with the files"
    raise ValueError(f"{path}: no tokenizer. Give {wanted}.")


def load_tiktoken(path: Path) -> Tokenizer:
    """Build the BPE of a .tiktoken file, lines of "base64-bytes rank".

    The file holds no split pattern; Qwen2's is used, which is cl100k's but for single digits.
    """
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    from trainer.train_tokenizer import QWEN2_PATTERN

    pairs = (line.split() for line in path.read_text(encoding="ascii").splitlines() if line)
    ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
    letters = bytes_to_unicode()  # GPT-2's visible character for each byte

    def spell(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    vocab = {spell(token): rank for token, rank in ranks.items()}
    merges = [(spell(left), spell(right)) for left, right in iter_merges(ranks)]
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    split = pre_tokenizers.Split(Regex(QWEN2_PATTERN), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    return tokenizer


def iter_merges(ranks: dict[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """In order, the two halves that are left of each entry before its own merge."""
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            joined = [ranks.get(left + right, rank) for left, right in pairwise(parts)]
            best = min(joined)
            if best >= rank:
                break
            i = joined.index(best)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            yield parts[0], parts[1]

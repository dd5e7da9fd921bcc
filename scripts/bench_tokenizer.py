"""How much text a token holds: our tokenizer against others, on held-out Chinese and English rows.

    python scripts/bench_tokenizer.py                                     # ours alone, on the toy world
    python scripts/bench_tokenizer.py --data_path zh.jsonl.xz en.jsonl.xz --tokenizer gpt2=FOLDER qwen=qwen.tiktoken
    python scripts/bench_tokenizer.py --tokenizer new=out/tokenizer --json out/tokenizer_bench.json

Measured is every 50th row of each file, the rows that trainer/train_tokenizer.py leaves out. More characters per token
mean shorter sequences; more entries mean a larger embedding and a slower output layer.
"""

import base64
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from trainer.arguments import arg, command, parse_args
from trainer.metrics import write_json
from trainer.train_tokenizer import QWEN2_PATTERN, held_out_counts, toy_paths


@dataclass
class BenchArgs:
    data_path: list[str] = arg(
        [], "files of text or conversations rows (.jsonl, .jsonl.gz, .jsonl.xz; default: the toy world)", nargs="+")
    tokenizer: list[str] = arg(
        [],
        "others to compare, NAME=PATH: a tokenizer.json, a folder with one or with GPT-2's two files, a .tiktoken file",
        nargs="*",
    )
    json: str = arg("", "write the figures to this file too")

    def check(self):
        """ValueError for a tokenizer without a name."""
        for item in self.tokenizer:
            if "=" not in item:
                raise ValueError(f"--tokenizer {item} has no name: give NAME=PATH, such as gpt2={item}")


def load_tokenizer(path: str) -> Tokenizer:
    """Load a tokenizer.json, a folder with one, a folder with GPT-2's vocabulary and merges, or a .tiktoken file."""
    found = Path(path)
    if found.suffix == ".tiktoken" and found.is_file():
        return from_ranks(found)
    for name in ("tokenizer.json", ""):
        if (found / name).is_file():
            return Tokenizer.from_file(str(found / name))
    for vocab, merges in (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")):
        if (found / vocab).is_file() and (found / merges).is_file():
            tokenizer = Tokenizer(models.BPE.from_file(str(found / vocab), str(found / merges)))
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            return tokenizer
    raise ValueError(f"{path}: no tokenizer. Give a tokenizer.json, a .tiktoken file, or a folder with the files.")


def from_ranks(path: Path) -> Tokenizer:
    """Build the BPE of a .tiktoken file, lines of "base64-bytes rank".

    The file holds no split pattern; Qwen2's is used, which is cl100k's but for single digits.
    """
    lines = path.read_text(encoding="ascii").split("\n")
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines if line)}
    letters = byte_letters()

    def spell(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    vocab = {spell(token): rank for token, rank in ranks.items()}
    merges = [(spell(left), spell(right)) for left, right in iter_merges(ranks)]
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    split = pre_tokenizers.Split(Regex(QWEN2_PATTERN), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    return tokenizer


def byte_letters() -> list[str]:
    """Return the visible character by which byte-level BPE writes each of the 256 bytes (GPT-2's table)."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in visible else next(others)) for byte in range(256)]


def iter_merges(ranks: dict[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """Yield the two halves that each entry was joined from, in order: what is left before its own merge."""
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


def main(argv=None):
    args = parse_args(BenchArgs, argv)
    data_path = args.data_path or toy_paths()
    paths = {"minimind": str(ROOT / "model"), **dict(item.split("=", 1) for item in args.tokenizer)}
    print("| tokenizer | entries | language | rows | characters per token | bytes per token |\n|---|---|---|---|---|---|")
    figures = []
    for name, path in paths.items():
        tokenizer = load_tokenizer(path)
        for lang, count in sorted(held_out_counts(data_path, tokenizer).items(), reverse=True):
            figure = {"tokenizer": name, "entries": tokenizer.get_vocab_size(), "language": lang, **count}
            figure["characters_per_token"] = count["characters"] / count["tokens"]
            figure["bytes_per_token"] = count["bytes"] / count["tokens"]
            figures.append(figure)
            print(
                f"| {name} | {figure['entries']:,} | {lang} | {count['rows']:,} "
                f"| {figure['characters_per_token']:.3f} | {figure['bytes_per_token']:.3f} |"
            )
    if args.json:
        write_json(args.json, figures)


if __name__ == "__main__":
    command(main)

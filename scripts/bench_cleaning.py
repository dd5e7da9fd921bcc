"""How fast corpora are cleaned, and how many planted duplicates are found: copies, near-copies, and what only looks alike.

    python scripts/bench_cleaning.py                                     # on the toy world
    python scripts/bench_cleaning.py --data_path zh.jsonl.xz en.jsonl.xz --rows 3000 --json out/bench_cleaning.json
    python scripts/bench_cleaning.py --threshold 0.7 --num_proc 1

Into the rows are planted, by the seed: exact copies; copies in which a share of the tokens (words, ideographs) is
replaced by others of the same file; and word problems of one template with other numbers, which must all stay. Recall
is the share of the planted copies that is dropped; the rows that go without the planted ones are counted apart.
"""

import json
import random
import re
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dataset.clean_corpus import CleanOptions, clean
from dataset.cleaning import row_text
from dataset.jsonl import find_shards, read_rows
from trainer.arguments import arg, check_positive, command, parse_args
from trainer.metrics import write_json

TOKEN = re.compile(r"[㐀-鿿]|[^\W_㐀-鿿]+")
TEMPLATES = (
    "A farmer has {a} sheep and buys {b} more at the market on Monday. On Friday {c} of them are sold. How many sheep does the "
    "farmer have now? First {a} + {b} sheep graze on the meadow, then {c} leave it, so we add and subtract.",
    "果园里有{a}棵苹果树，春天又种下{b}棵梨树，夏天的台风吹倒了{c}棵。果园里现在还剩多少棵树？先把{a}和{b}加起来，再减去{c}，就是剩下的树。",
)


@dataclass
class BenchArgs:
    data_path: list[str] = arg([], "files of text or conversations rows (default: the toy world)", nargs="+")
    rows: int = arg(2000, "rows to read of each file for the search for duplicates")
    min_chars: int = arg(100, "rows shorter than this get no edited copy: one token is too large a share of them")
    copies: int = arg(100, "copies of each kind to plant")
    edit_rates: list[float] = arg([0.02, 0.05, 0.1], "shares of the tokens to replace", nargs="+")
    threshold: float = arg(0.8, "Jaccard similarity of near-duplicates")
    num_proc: int = arg(0, "processes; 0: all cores")
    repeats: int = arg(3, "timed runs on the whole files, of which the fastest counts; 0: do not time")
    seed: int = arg(0, "of the planting")
    json: str = arg("", "write the figures to this file too")

    def check(self):
        """ValueError for counts and shares out of range."""
        check_positive(self, "rows", "copies", "min_chars")
        if not all(0 < rate < 1 for rate in self.edit_rates):
            raise ValueError("--edit_rates: give shares between 0 and 1")


def edited(text: str, rate: float, vocabulary: list[str], draw: random.Random) -> str:
    """Return the text with that share of its tokens, one at least, replaced by others of their kind (word, ideograph)."""
    kinds = {kind: [token for token in vocabulary if is_ideograph(token) == kind] or vocabulary for kind in (True, False)}
    spans = [match.span() for match in TOKEN.finditer(text)]
    for start, end in sorted(draw.sample(spans, max(1, round(rate * len(spans)))), reverse=True):
        text = text[:start] + draw.choice(kinds[is_ideograph(text[start])]) + text[end:]
    return text


def is_ideograph(token: str) -> bool:
    """Tell whether a token is a Chinese character rather than a word."""
    return "\u3400" <= token[0] <= "\u9fff"


def plant(texts: list[str], args: BenchArgs) -> list[tuple[str, str]]:
    """Return (kind, text) of all rows in a shuffled order; originals are of kind "original" and come before their copies."""
    draw = random.Random(args.seed)
    vocabulary = [token for text in islice(texts, 200) for token in TOKEN.findall(text) if not token[0].isdigit()]
    candidates = [text for text in texts if len(text) >= args.min_chars]
    kinds = ["exact", *(f"edited {rate:.0%}" for rate in args.edit_rates)]
    if len(candidates) < args.copies * len(kinds):
        raise ValueError(f"{len(candidates)} rows of {args.min_chars} characters or more, {args.copies * len(kinds)} are needed. "
                         f"Give more --data_path, fewer --copies, or a smaller --min_chars.")
    sources = draw.sample(candidates, args.copies * len(kinds))
    copies = [("exact", text) for text in sources[: args.copies]]
    for i, rate in enumerate(args.edit_rates, start=1):
        chosen = sources[i * args.copies : (i + 1) * args.copies]
        copies += [(kinds[i], edited(text, rate, vocabulary, draw)) for text in chosen]
    numbers = [tuple(draw.sample(range(100, 1000), 3)) for _ in range(args.copies)]
    alike = [("same template", TEMPLATES[i % 2].format(a=a, b=b, c=c)) for i, (a, b, c) in enumerate(numbers)]
    draw.shuffle(copies)
    return [("original", text) for text in texts] + alike + copies


def find_planted(rows: list[tuple[str, str]], args: BenchArgs, as_text: bool) -> dict[str, dict]:
    """Clean the rows and return, per kind, how many there are and how many were dropped.

    as_text: as pretraining rows; otherwise as conversations, where numbers matter.
    """
    with tempfile.TemporaryDirectory() as folder:
        source, rejected = Path(folder, "rows.jsonl"), Path(folder, "rejected.jsonl")
        with open(source, "w", encoding="utf-8") as file:
            for _, text in rows:
                turns = [{"role": "user", "content": text}, {"role": "assistant", "content": "OK"}]
                file.write(json.dumps({"text": text} if as_text else {"conversations": turns}, ensure_ascii=False) + "\n")
        options = CleanOptions(threshold=args.threshold)
        clean([str(source)], str(Path(folder, "out.jsonl")), options, rejected=str(rejected), num_proc=args.num_proc or None)
        entries = [json.loads(line) for line in rejected.read_text(encoding="utf-8").splitlines()]
    dropped = [int(entry["where"].split()[0].rsplit(":", 1)[1]) - 1 for entry in entries if "duplicate" in entry["reason"]]
    found, total = Counter(rows[line][0] for line in dropped), Counter(kind for kind, _ in rows)
    order = ["original", "same template", "exact", *(f"edited {rate:.0%}" for rate in args.edit_rates)]
    return {kind: {"rows": total[kind], "dropped": found[kind]} for kind in order}


def measure_speed(paths: list[str], args: BenchArgs) -> list[dict]:
    """Return, per file, the megabytes of rows cleaned per second, in the fastest of the runs, from reading to writing."""
    figures = []
    for path in paths:
        seconds = []
        for _ in range(args.repeats):
            with tempfile.TemporaryDirectory() as folder:
                start = time.perf_counter()
                report = clean([path], str(Path(folder, "out.jsonl")), CleanOptions(threshold=args.threshold),
                               num_proc=args.num_proc or None)
                seconds.append(time.perf_counter() - start)
        figures.append({"file": Path(path).name, "megabytes": report.bytes_read / 1e6, "seconds": min(seconds),
                        "megabytes_per_second": report.bytes_read / 1e6 / min(seconds), "report": asdict(report)})
    return figures


def toy_rows(folder: str) -> list[str]:
    """Write the toy world's pretraining text, ten rows to a document, and return the file."""
    from dataset.toy_world import write_world

    write_world("mini", folder)
    texts = [row["text"] for _, row in read_rows(Path(folder, "pretrain_train.jsonl"))]
    path = Path(folder, "documents.jsonl")
    documents = [{"text": "\n".join(texts[i : i + 10])} for i in range(0, len(texts), 10)]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in documents), encoding="utf-8")
    return [str(path)]


def main(argv=None):
    args = parse_args(BenchArgs, argv)
    with tempfile.TemporaryDirectory() as folder:
        paths = [path for path, _ in find_shards(args.data_path or toy_rows(folder))]
        texts = [row_text(row) for path in paths for _, row in islice(read_rows(path), args.rows)]
        rows = plant(list(dict.fromkeys(texts)), args)
        figures = {"arguments": asdict(args), "running text": find_planted(rows, args, as_text=True),
                   "conversations": find_planted(rows, args, as_text=False)}
        print("| planted | rows | dropped as running text | dropped as conversations |\n|---|---|---|---|")
        for kind, found in figures["running text"].items():
            print(f"| {kind} | {found['rows']:,} | {found['dropped']:,} | {figures['conversations'][kind]['dropped']:,} |")
        figures["speed"] = measure_speed(paths, args) if args.repeats else []
        for one in figures["speed"]:
            print(f"{one['file']}: {one['megabytes']:,.1f} MB, {one['seconds']:.1f} s, {one['megabytes_per_second']:.1f} MB/s")
    if args.json:
        write_json(args.json, figures)


if __name__ == "__main__":
    command(main)

"""How fast corpora are cleaned, and how many planted duplicates are found: copies, near-copies, and
rows that only look alike.

    python scripts/bench.py cleaning                                     # on the toy world
    python scripts/bench.py cleaning --data_path zh.jsonl.xz en.jsonl.xz --rows 3000
    python scripts/bench.py cleaning --threshold 0.7 --num_proc 1

By the seed, these are planted into the rows: exact copies; copies in which a fraction of the tokens
(words, ideographs) is replaced by others of the same file; and word problems of one template with
other numbers, which must all stay. The rows are cleaned once as running text, and once as
conversations, where numbers matter. The last lines are the speed, of the fastest run per file.
"""

import random
import re
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from dataset.files.jsonl import dump_row, find_shards, read_rows
from scripts.benchmarks.results import BenchArgs, Results
from trainer.runtime.arguments import arg, check_positive

TOKEN = re.compile(r"[㐀-鿿]|[^\W_㐀-鿿]+")
TEMPLATES = (
    "A farmer has {a} sheep and buys {b} more at the market on Monday. On Friday {c} of them are "
    "sold. How many sheep does the farmer have now? First {a} + {b} sheep graze on the meadow, "
    "then {c} leave it, so we add and subtract.",
    "果园里有{a}棵苹果树，春天又种下{b}棵梨树，夏天的台风吹倒了{c}棵。果园里现在还剩多少棵树？"
    "先把{a}和{b}加起来，再减去{c}，就是剩下的树。",
)
COLUMNS = "planted rows dropped_as_text dropped_as_conversations"


@dataclass
class Args(BenchArgs):
    data_path: list[str] = arg([], "files of text or chat rows (default: the toy world)", nargs="+")
    rows: int = arg(2000, "rows to read of each file for the search for duplicates")
    min_chars: int = arg(
        100, "shorter rows get no edited copy: one token is too large a fraction of them"
    )
    copies: int = arg(100, "copies of each kind to plant")
    edit_rates: list[float] = arg([0.02, 0.05, 0.1], "fractions of tokens to replace", nargs="+")
    threshold: float = arg(0.8, "Jaccard similarity of near-duplicates")
    num_proc: int = arg(0, "processes; 0: all cores")
    repeats: int = arg(3, "timed runs on the whole files: the fastest counts; 0: do not time")
    seed: int = arg(0, "of the planting")

    def check(self) -> None:
        check_positive(self, "rows", "copies", "min_chars")
        if not all(0 < rate < 1 for rate in self.edit_rates):
            raise ValueError("--edit_rates: give fractions between 0 and 1")


def measure(args: Args, results: Results) -> None:
    """A row per kind of planted copies, then the speed."""
    from dataset.prepare.cleaning import row_text

    with tempfile.TemporaryDirectory() as folder:
        paths = [path for path, _ in find_shards(args.data_path or toy_documents(folder))]
        texts = [row_text(row) for path in paths for _, row in islice(read_rows(path), args.rows)]
        rows = plant(list(dict.fromkeys(texts)), args)
        total = Counter(kind for kind, _ in rows)
        as_text, as_chats = (find_planted(rows, args, as_text=one) for one in (True, False))
        for kind in ("original", "same template", "exact", *map(edit_name, args.edit_rates)):
            counts = total[kind], as_text[kind], as_chats[kind]
            results.add(dict(zip(results.columns, (kind, *counts))))
        speed = [measure_speed(path, args) for path in paths] if args.repeats else []
        line = "{file}: {megabytes:,.1f} MB, {seconds:.1f} s, {megabytes_per_s:.1f} MB/s"
        results.note("\n".join(line.format(**one) for one in speed), speed=speed)


def toy_documents(folder: str) -> list[str]:
    """Write the toy world's pretraining text, ten rows to a document; returns the file."""
    from dataset.toy_world import write_world

    write_world("mini", folder)
    texts = [row["text"] for _, row in read_rows(Path(folder, "pretrain_train.jsonl"))]
    documents = [{"text": "\n".join(texts[i : i + 10])} for i in range(0, len(texts), 10)]
    path = Path(folder, "documents.jsonl")
    path.write_text("".join(map(dump_row, documents)), encoding="utf-8")
    return [str(path)]


def edit_name(rate: float) -> str:
    """The kind of copies that are edited at that rate."""
    return f"edited {rate:.0%}"


def plant(texts: list[str], args: Args) -> list[tuple[str, str]]:
    """(kind, text) of all rows; the originals come first, then their copies in a shuffled order."""
    draw = random.Random(args.seed)
    tokens = (token for text in islice(texts, 200) for token in TOKEN.findall(text))
    vocabulary = [token for token in tokens if not token[0].isdigit()]
    candidates = [text for text in texts if len(text) >= args.min_chars]
    number = args.copies * (1 + len(args.edit_rates))
    if len(candidates) < number:
        raise ValueError(
            f"{len(candidates)} rows of {args.min_chars} characters or more, {number} are needed. "
            "Give more --data_path, fewer --copies, or a smaller --min_chars."
        )
    sources = iter(draw.sample(candidates, number))
    copies = [("exact", text) for text in islice(sources, args.copies)]
    for rate in args.edit_rates:
        chosen = islice(sources, args.copies)
        copies += [(edit_name(rate), edited(text, rate, vocabulary, draw)) for text in chosen]
    alike = []
    for i in range(args.copies):
        a, b, c = draw.sample(range(100, 1000), 3)
        alike.append(("same template", TEMPLATES[i % 2].format(a=a, b=b, c=c)))
    draw.shuffle(copies)
    return [("original", text) for text in texts] + alike + copies


def edited(text: str, rate: float, vocabulary: list[str], draw: random.Random) -> str:
    """The text with a fraction of its tokens, one at least, replaced by others of their kind."""
    kinds = {
        kind: [token for token in vocabulary if is_ideograph(token) == kind] or vocabulary
        for kind in (True, False)
    }
    spans = [match.span() for match in TOKEN.finditer(text)]
    for start, end in sorted(draw.sample(spans, max(1, round(rate * len(spans)))), reverse=True):
        text = text[:start] + draw.choice(kinds[is_ideograph(text[start])]) + text[end:]
    return text


def is_ideograph(token: str) -> bool:
    """Whether a token is a Chinese character rather than a word."""
    return "\u3400" <= token[0] <= "\u9fff"


def _clean(path, folder, args, rejected=""):
    from dataset.prepare.clean_corpus import clean
    from dataset.prepare.verdicts import CleanOptions

    options, num_proc = CleanOptions(threshold=args.threshold), args.num_proc or None
    return clean([path], f"{folder}/out.jsonl", options, rejected=rejected, num_proc=num_proc)


def find_planted(rows: list[tuple[str, str]], args: Args, as_text: bool) -> Counter:
    """Clean the rows; returns how many of each kind were dropped as duplicates."""
    with tempfile.TemporaryDirectory() as folder:
        source, rejected = Path(folder, "rows.jsonl"), Path(folder, "rejected.jsonl")
        lines = (dump_row(as_row(text, as_text)) for _, text in rows)
        source.write_text("".join(lines), encoding="utf-8")
        _clean(str(source), folder, args, str(rejected))
        entries = [entry for _, entry in read_rows(rejected)]
    dropped = (entry["where"] for entry in entries if "duplicate" in entry["reason"])
    return Counter(rows[int(place.split()[0].rsplit(":", 1)[1]) - 1][0] for place in dropped)


def as_row(text: str, as_text: bool) -> dict[str, Any]:
    """A pretraining row, or a conversation that asks for the text."""
    if as_text:
        return {"text": text}
    turns = [{"role": "user", "content": text}, {"role": "assistant", "content": "OK"}]
    return {"conversations": turns}


def measure_speed(path: str, args: Args) -> dict[str, Any]:
    """Megabytes of rows cleaned per second, from reading to writing, in the fastest of the runs."""
    seconds = []
    for _ in range(args.repeats):
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            report = _clean(path, folder, args)
            seconds.append(time.perf_counter() - start)
    megabytes = report.bytes_read / 1e6
    return {
        "file": Path(path).name,
        "megabytes": megabytes,
        "seconds": min(seconds),
        "megabytes_per_s": megabytes / min(seconds),
        "report": asdict(report),
    }

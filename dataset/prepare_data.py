"""Prepare data: fetch published files, turn other formats into ours, clean what was collected.

    python dataset/prepare_data.py download pretrain_t2t_mini sft_t2t_mini --hub modelscope    # no names: list the files
    python dataset/prepare_data.py convert alpaca.json chats.parquet --out dataset/chats.jsonl
    python dataset/prepare_data.py clean dataset/chats.jsonl --out dataset/chats_clean.jsonl --rejected out/rejected.jsonl
    python dataset/prepare_data.py clean web/*.jsonl.gz --out dataset/web.jsonl --eval test.jsonl --json out/cleaning.json

`<command> --help` lists the flags of each. dataset.md says what the steps do, and with what figures.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dataset.clean_corpus import CleanOptions, clean
from dataset.cleaning import Limits
from dataset.contamination import build_index
from dataset.download import HUBS, download, find_file, list_files
from dataset.jsonl import find_shards

FOREIGN = (".json", ".parquet", ".csv", ".tsv", ".txt")  # what convert reads and clean does not
FORMATS = ("auto", "alpaca", "sharegpt", "messages", "preference", "text")


def flag(default, help: str, **options):
    """A dataclass field that is also a flag."""
    metadata = {"help": help, **options}
    return field(default_factory=lambda: list(default), metadata=metadata) if isinstance(default, list) else field(
        default=default, metadata=metadata)


@dataclass
class DownloadArgs:
    """Fetch published data sets: resumable, and checked by the digest that the hub states."""

    names: list[str] = flag([], "files, with or without .jsonl; none: list what there is", nargs="*", positional=True)
    hub: str = flag("huggingface", "where from; HF_ENDPOINT or MODELSCOPE_ENDPOINT names a mirror", choices=list(HUBS))
    repo: str = flag("", "another data set repository, owner/name (default: the published MiniMind data)")
    revision: str = flag("", "branch, tag or commit (default: the main branch)")
    out_dir: str = flag(str(ROOT / "dataset"), "folder to put the files into")
    sha256: str = flag("", "what the content must hash to; with one name (default: what the hub states)")
    json: str = flag("", "write the figures to this file too")


@dataclass
class ConvertArgs:
    """Turn alpaca, sharegpt, OpenAI messages, preference pairs and plain text into the formats of dataset.md."""

    files: list[str] = flag([], ".jsonl (.gz, .xz), .json, .parquet, .csv, .tsv, .txt", nargs="+", positional=True)
    out: str = flag("", "file to write: .jsonl, .jsonl.gz or .jsonl.xz", required=True)
    format: str = flag("auto", "of the rows (default: seen from each row's keys)", choices=FORMATS)
    split: str = flag("", "what a row is in a .txt file (default: paragraphs)", choices=("paragraphs", "file", "lines"))
    bad_rows: str = flag("stop", "at a row that fits no format", choices=("stop", "skip"))
    json: str = flag("", "write the figures to this file too")


@dataclass(frozen=True)
class CleanArgs(Limits):
    """Normalise, filter and de-duplicate rows; drop those that hold pieces of evaluation files; say what went and why."""

    files: list[str] = flag([], "files, folders, globs: .jsonl, .jsonl.gz, .jsonl.xz", nargs="+", positional=True)
    out: str = flag("", "file to write: .jsonl, .jsonl.gz or .jsonl.xz", required=True)
    rejected: str = flag("", "write the dropped rows with the reason there")
    eval: list[str] = flag([], "evaluation files that the data must not contain", nargs="+")
    form: str = flag("NFC", "Unicode normal form", choices=("NFC", "NFKC", "NFD", "NFKD"))
    exact: str = flag("yes", "drop exact duplicates", choices=("yes", "no"))
    threshold: float = flag(0.8, "Jaccard similarity from which rows are near-duplicates; 0: keep them")
    numbers: str = flag("auto", "rows with other numbers are other rows: yes, no, or auto (all but running text)",
                        choices=("auto", "yes", "no"))
    num_proc: int = flag(0, "processes (default: all cores)")
    engine: str = flag("local", "ray: judge rows on a Ray cluster whose machines all see the files", choices=("local", "ray"))
    json: str = flag("", "write the figures to this file too")


LIMIT_HELP = {
    "min_chars": "characters but spaces that a row needs (default: 20 for running text, 2 for others)",
    "max_chars": "characters that a row may have", "max_replacement": "share of U+FFFD",
    "min_letters": "running text: share of letters and ideographs", "max_repeated_lines": "running text: share of repeated lines",
    "max_top_ngram": "running text: share of its most frequent 4-gram", "max_repeated_ngrams": "share of repeated 12-grams"}


def add_flags(parser: argparse.ArgumentParser, cls) -> None:
    """Add a flag per field of a dataclass, of the type of its default."""
    for one in fields(cls):
        options = {key: one.metadata[key] for key in ("nargs", "choices", "required") if key in one.metadata}
        default = one.default if one.default is not MISSING else one.default_factory()
        kind = type(default) if isinstance(default, int | float) else int if default is None else str
        note = one.metadata.get("help") or LIMIT_HELP[one.name]
        if "positional" in one.metadata:
            parser.add_argument(one.name, help=note, **options)
            continue
        shown = "" if "default:" in note or default in ("", [], None, 0) else f" (default: {default})".replace(f"{ROOT}/", "")
        parser.add_argument(f"--{one.name}", type=kind, default=default, help=note + shown, **options)


def run_download(args: DownloadArgs) -> dict:
    """Fetch the files, or list what there is."""
    if args.sha256 and len(args.names) != 1:
        raise ValueError(f"--sha256 is for one file, {len(args.names)} are named. Fetch that file alone.")
    published = list_files(args.hub, args.repo or None, args.revision or None)
    if not args.names:
        for name, file in sorted(published.items()):
            print(f"{file.size / 1e6:12,.1f} MB  {name}")
    files = [find_file(published, name) for name in args.names]
    for file in files:
        path = download(args.hub, file, args.out_dir, args.sha256)
        checked = file.sha256 or file.git_sha1 or args.sha256
        print(f"{path}: {file.size:,} bytes, {'checksum right' if checked else 'the hub states no checksum'}")
    return {file.name: asdict(file) for file in files or published.values()}


def run_convert(args: ConvertArgs) -> dict:
    """Convert the files into one."""
    from dataset.convert import convert  # it imports transformers: seconds that the other commands need not wait

    report = convert(args.files, args.out, args.format, args.split, args.bad_rows)
    print(f"{report}\n{args.out}")
    return asdict(report)


def run_clean(args: CleanArgs) -> dict:
    """Clean the files into one."""
    for path in args.files:
        if path.lower().endswith(FOREIGN):
            raise ValueError(f"{path}: clean reads .jsonl files. Turn it into one first: "
                             f"python dataset/prepare_data.py convert {path} --out {Path(path).stem}.jsonl")
    shards = find_shards(args.files)
    if any(share < 1 for _, share in shards):
        raise ValueError("a share (FILE@0.4) is for training; clean the whole file.")
    paths = [path for path, _ in shards]
    if args.num_proc < 0:
        raise ValueError(f"--num_proc {args.num_proc}: give 1 or more, or leave it out for all cores")
    limits = Limits(**{one.name: getattr(args, one.name) for one in fields(Limits)})
    options = CleanOptions(limits, args.form, args.exact == "yes", args.threshold, args.numbers)
    index = build_index([path for path, _ in find_shards(args.eval)], args.form) if args.eval else None
    start = time.perf_counter()
    report = clean(paths, args.out, options, index, args.rejected, args.num_proc or None, args.engine)
    seconds = time.perf_counter() - start
    figures = {**asdict(report), "seconds": seconds, "megabytes_per_second": report.bytes_read / 1e6 / seconds}
    if index:
        figures |= {"evaluation_items": len(index.places), "evaluation_items_too_short": index.short}
        print(f"evaluation: {len(index.places):,} different items, {index.short:,} of them too short to be looked for")
    print(f"{report}\n{seconds:,.1f} s, {report.bytes_read / 1e6 / seconds:,.1f} MB/s\n{args.out}")
    return figures


COMMANDS = {"download": (DownloadArgs, run_download), "convert": (ConvertArgs, run_convert), "clean": (CleanArgs, run_clean)}


def main(argv=None) -> None:
    """Run one of the commands; what a user can put right ends it with one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (cls, _) in COMMANDS.items():
        add_flags(commands.add_parser(name, help=cls.__doc__, description=cls.__doc__), cls)
    given = vars(parser.parse_args(argv))
    cls, run = COMMANDS[given.pop("command")]
    try:
        figures = run(cls(**given))
        if given["json"]:
            Path(given["json"]).parent.mkdir(parents=True, exist_ok=True)
            Path(given["json"]).write_text(json.dumps(figures, ensure_ascii=False, indent=1), encoding="utf-8")
    except KeyboardInterrupt:
        sys.exit("\ninterrupted: no output was written; a download goes on with the same command")
    except (ValueError, OSError, ImportError) as error:
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
        if raised_in.parent != ROOT / "dataset" and not getattr(error, "filename", None):  # a bug: all of it is needed
            raise
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

"""Prepare data: fetch published files, turn other formats into ours, clean a collection.

    python dataset/prepare_data.py download                     # without names: list the files
    python dataset/prepare_data.py download pretrain_t2t_mini sft_t2t_mini --hub modelscope
    python dataset/prepare_data.py convert alpaca.json chats.parquet --out dataset/chats.jsonl
    python dataset/prepare_data.py clean dataset/chats.jsonl --out dataset/chats_clean.jsonl
    python dataset/prepare_data.py clean web/*.jsonl.gz --out dataset/web.jsonl --eval test.jsonl

`<command> --help` lists the flags of each. dataset.md explains the steps, with measured results.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dataset.files.jsonl import find_shards
from dataset.prepare.clean_corpus import clean
from dataset.prepare.cleaning import Limits
from dataset.prepare.contamination import build_index
from dataset.prepare.convert import FORMATS, convert
from dataset.prepare.download import HUBS, download, find_file, list_files
from dataset.prepare.foreign_files import SPLITS
from dataset.prepare.verdicts import CleanOptions
from model.files import forgive_text, write_json

FOREIGN = (".json", ".parquet", ".csv", ".tsv", ".txt")  # read by convert, not by clean


def flag(default: Any, help: str, **options: Any) -> Any:
    """A dataclass field that is also a flag."""
    metadata = {"help": help, **options}
    if isinstance(default, list):
        return field(default_factory=list, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class DownloadArgs:
    """Fetch published data sets: resumable, and checked by the digest that the hub states."""

    names: list[str] = flag(
        [], "files, with or without .jsonl; none: list all", nargs="*", positional=True
    )
    hub: str = flag(
        "huggingface",
        "where from; HF_ENDPOINT or MODELSCOPE_ENDPOINT names a mirror",
        choices=list(HUBS),
    )
    repo: str = flag(
        "", "another data set repository, owner/name (default: the published MiniMind data)"
    )
    revision: str = flag("", "branch, tag or commit (default: the main branch)")
    out_dir: str = flag(str(ROOT / "dataset"), "folder to put the files into")
    sha256: str = flag("", "expected digest of the content; with one name (default: the hub's)")
    json: str = flag("", "write the metrics to this file too")


@dataclass
class ConvertArgs:
    """Turn alpaca, sharegpt, OpenAI messages, preference pairs and plain text into the formats of
    dataset.md.
    """

    files: list[str] = flag(
        [], ".jsonl (.gz, .xz), .json, .parquet, .csv, .tsv, .txt", nargs="+", positional=True
    )
    out: str = flag("", "file to write: .jsonl, .jsonl.gz or .jsonl.xz", required=True)
    format: str = flag(
        "auto", "of the rows (default: seen from each row's keys)", choices=("auto", *FORMATS)
    )
    split: str = flag("", "row of a .txt file (default: paragraphs)", choices=SPLITS)
    bad_rows: str = flag("stop", "at a row that fits no format", choices=("stop", "skip"))
    json: str = flag("", "write the metrics to this file too")


@dataclass(frozen=True)
class CleanArgs(Limits):
    """Normalise, filter and de-duplicate rows; drop those that hold pieces of evaluation files;
    report the reasons.
    """

    files: list[str] = flag(
        [], "files, folders, globs: .jsonl, .jsonl.gz, .jsonl.xz", nargs="+", positional=True
    )
    out: str = flag("", "file to write: .jsonl, .jsonl.gz or .jsonl.xz", required=True)
    rejected: str = flag("", "write the dropped rows with the reason there")
    eval: list[str] = flag([], "evaluation files that the data must not contain", nargs="+")
    form: str = flag("NFC", "Unicode normal form", choices=("NFC", "NFKC", "NFD", "NFKD"))
    exact: str = flag("yes", "drop exact duplicates", choices=("yes", "no"))
    threshold: float = flag(
        0.8, "Jaccard similarity from which rows are near-duplicates; 0: keep them"
    )
    numbers: str = flag(
        "auto",
        "rows with other numbers are other rows: yes, no, or auto (all but running text)",
        choices=("auto", "yes", "no"),
    )
    num_proc: int = flag(0, "processes (default: all cores)")
    engine: str = flag(
        "local",
        "ray: judge rows on a Ray cluster whose machines all see the files",
        choices=("local", "ray"),
    )
    json: str = flag("", "write the metrics to this file too")


LIMIT_HELP = {
    "min_chars": "characters but spaces that a row needs (default: 20 for text, 2 for others)",
    "max_chars": "characters that a row may have",
    "max_replacement": "ratio of U+FFFD",
    "min_letters": "running text: ratio of letters and ideographs",
    "max_repeated_lines": "running text: ratio of repeated lines",
    "max_top_ngram": "running text: ratio of its most frequent 4-gram",
    "max_repeated_ngrams": "ratio of repeated 12-grams",
}


def add_flags(parser: argparse.ArgumentParser, cls: type) -> None:
    """Add a flag per field of a dataclass, of the type of its default."""
    for one in fields(cls):
        options = dict(one.metadata)
        note = options.pop("help", None) or LIMIT_HELP[one.name]
        if options.pop("positional", False):
            parser.add_argument(one.name, help=note, **options)
            continue
        default = one.default if one.default is not MISSING else one.default_factory()
        if "default:" not in note and default not in ("", [], None, 0):
            note += f" (default: {default})".replace(f"{ROOT}/", "")
        is_number = isinstance(default, int | float)
        kind = type(default) if is_number else int if default is None else str
        parser.add_argument(f"--{one.name}", type=kind, default=default, help=note, **options)


def run_download(args: DownloadArgs) -> dict:
    """Fetch the files, or list all."""
    if args.sha256 and len(args.names) != 1:
        raise ValueError(
            f"--sha256 is for one file, {len(args.names)} are named. Fetch that file alone."
        )
    published = list_files(args.hub, args.repo or None, args.revision or None)
    if not args.names:
        for name, file in sorted(published.items()):
            print(f"{file.size / 1e6:12,.1f} MB  {name}")
    files = [find_file(published, name) for name in args.names]
    for file in files:
        path = download(args.hub, file, args.out_dir, args.sha256)
        is_checked = file.sha256 or file.git_sha1 or args.sha256
        checksum = "checksum right" if is_checked else "the hub states no checksum"
        print(f"{path}: {file.size:,} bytes, {checksum}")
    return {file.name: asdict(file) for file in files or published.values()}


def run_convert(args: ConvertArgs) -> dict:
    """Convert the files into one."""
    report = convert(args.files, args.out, args.format, args.split, args.bad_rows)
    print(f"{report}\n{args.out}")
    return asdict(report)


def run_clean(args: CleanArgs) -> dict:
    """Clean the files into one."""
    for path in args.files:
        if path.lower().endswith(FOREIGN):
            raise ValueError(
                f"{path}: clean reads .jsonl files. Turn it into one first: "
                f"python dataset/prepare_data.py convert {path} --out {Path(path).stem}.jsonl"
            )
    shards = find_shards(args.files)
    if any(fraction < 1 for _, fraction in shards):
        raise ValueError("a fraction (FILE@0.4) is for training; clean the whole file.")
    paths = [path for path, _ in shards]
    if args.num_proc < 0:
        raise ValueError(
            f"--num_proc {args.num_proc}: give 1 or more, or leave it out for all cores"
        )
    limits = Limits(**{one.name: getattr(args, one.name) for one in fields(Limits)})
    options = CleanOptions(
        limits, args.form, args.exact == "yes", args.threshold, args.numbers, args.engine
    )
    eval_paths = [path for path, _ in find_shards(args.eval)] if args.eval else []
    index = build_index(eval_paths, args.form) if args.eval else None
    start = time.perf_counter()
    report = clean(paths, args.out, options, index, args.rejected, args.num_proc or None)
    seconds = time.perf_counter() - start
    speed = report.bytes_read / 1e6 / seconds
    metrics = {**asdict(report), "seconds": seconds, "megabytes_per_second": speed}
    if index:
        num_items = len(index.places)
        metrics |= {"evaluation_items": num_items, "evaluation_items_too_short": index.short}
        print(
            f"evaluation: {num_items:,} different items, {index.short:,} of them too short to be "
            "looked for"
        )
    print(f"{report}\n{seconds:,.1f} s, {speed:,.1f} MB/s\n{args.out}")
    return metrics


COMMANDS = {
    "download": (DownloadArgs, run_download),
    "convert": (ConvertArgs, run_convert),
    "clean": (CleanArgs, run_clean),
}


def main(argv: list[str] | None = None) -> None:
    """Run one of the commands; a user's mistake ends it with one line."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (cls, _) in COMMANDS.items():
        command = commands.add_parser(
            name, help=cls.__doc__, description=cls.__doc__, allow_abbrev=False
        )
        add_flags(command, cls)
    given = vars(parser.parse_args(argv))
    cls, run = COMMANDS[given.pop("command")]
    try:
        metrics = run(cls(**given))
        if given["json"]:
            write_json(given["json"], metrics)
    except KeyboardInterrupt:
        sys.exit("\ninterrupted: no output was written; the same command resumes a download")
    except (ValueError, OSError, ImportError) as error:
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
        is_ours = any(ROOT / room in raised_in.parents for room in ("dataset", "model"))
        if not is_ours and not getattr(error, "filename", None):  # a bug: all of it is needed
            raise
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    forgive_text()
    main()

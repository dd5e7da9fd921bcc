"""Write, from a seed, a small bilingual world whose every question has a checkable answer.

    python dataset/toy_world.py --level mini --out_dir dataset/toy_mini --seed 0
    python dataset/toy_world.py --level full --out_dir dataset/toy_full --seed 0

Each stage gets `<stage>_train.jsonl` and `<stage>_heldout.jsonl`: pretrain, sft, lora, tools
(conversations that call tools, with more different arguments than sft has), reason, dpo, rl, agent
(formats: dataset.md). `meta.json` names level, seed, a hash of these sources and the rows of every
file.

"Held out": a stable hash of a canonical key decides, 15% of all keys, for every seed alike (see
toy/core.py). No training file, the pretraining text included, contains a held-out pair of operands,
list to sort or count, (weekday, number of days), (number, unit), story, looked-up pair, city, item
or date span. Three exceptions are by intention and must be known when accuracies are read:
- longer sums are made of sums and differences of one-digit numbers, round tens and products with 1,
  5, 10; these are always training material and never asked as held-out arithmetic;
- a held-out *fact* is a phrasing: the question template is new for this (entity, attribute,
  language), but the fact stands in the training text, since it could not be known otherwise. The
  same holds for LoRA's facts and for polite requests (`preferences`), which ask known facts in new
  combinations of request and phrasing;
- a held-out *identity* question is an unseen phrasing whose answer training gives to other
  phrasings.
"""

import argparse
import hashlib
import json
import random
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dataset.files.jsonl import dump_row
from dataset.files.outputs import whole_folder
from dataset.toy.core import LEVELS
from dataset.toy.rows import stage_rows
from dataset.toy.world import World, make_world
from model.files import forgive_text, write_json

# These, level and seed decide a world: after any change of them old folders are written again.
SOURCE_FILES = [
    Path(__file__),
    ROOT / "dataset" / "chat" / "arithmetic.py",
    *sorted((ROOT / "dataset" / "toy").glob("*.py")),
]
SOURCES = hashlib.sha256(b"".join(path.read_bytes() for path in SOURCE_FILES)).hexdigest()[:12]
SPLITS = ("train", "heldout")
STAGES = ("pretrain", "sft", "lora", "tools", "reason", "dpo", "rl", "agent")


def write_files(world: World, folder: Path) -> dict[str, dict]:
    """Write every file of a world, rows shuffled, and return {file name: rows and bytes}."""
    files = {}
    for stage in STAGES:
        for split in SPLITS:
            rows = list(stage_rows(world, stage, split))
            random.Random(f"{world.seed}/{stage}/{split}/order").shuffle(rows)
            path = folder / f"{stage}_{split}.jsonl"
            path.write_bytes("".join(map(dump_row, rows)).encode())
            files[path.name] = {"rows": len(rows), "bytes": path.stat().st_size}
    return files


def is_complete(folder: Path, level: str, seed: int) -> bool:
    """Whether the folder already holds this level and seed; ValueError if it holds other files."""
    meta_path = folder / "meta.json"
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    if not meta_path.is_file():
        raise ValueError(
            f"{folder} is not empty and was not written by this script. Choose another --out_dir."
        )
    meta = json.loads(meta_path.read_text(encoding="utf-8"))
    wanted = {"level": level, "seed": seed, "sources": SOURCES}
    if any(meta.get(key) != value for key, value in wanted.items()):
        return False
    paths = {folder / name: entry["bytes"] for name, entry in meta["files"].items()}
    return all(path.is_file() and path.stat().st_size == size for path, size in paths.items())


def write_world(level: str, out_dir: str | Path, seed: int = 0) -> bool:
    """Write a world into `out_dir`, all or nothing; False (and no change) if it is there already.

    A folder of this script with another level, seed or generator is replaced; any other non-empty
    folder is a ValueError.
    """
    folder = Path(out_dir).resolve()
    if is_complete(folder, level, seed):
        return False
    world = make_world(level, seed)
    with whole_folder(folder) as draft:
        files = write_files(world, draft)
        meta = {"level": level, "seed": seed, "sources": SOURCES, "files": files}
        write_json(draft / "meta.json", meta)
    return True


def main(argv: list[str] | None = None) -> None:
    """The command line: --level, --out_dir, --seed, --json."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.partition("\n")[0])
    parser.add_argument("--level", choices=LEVELS, default="mini")
    parser.add_argument("--out_dir", help="default: dataset/toy_<level> of the repository")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="also write the printed counts to FILE")
    args = parser.parse_args(argv)
    folder = Path(args.out_dir) if args.out_dir else ROOT / "dataset" / f"toy_{args.level}"
    written = write_world(args.level, folder, args.seed)
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    there = f"level {args.level}, seed {args.seed} is there already, nothing to do"
    print(f"{folder}: {'written' if written else there}")
    for name, entry in meta["files"].items():
        print(f"{name:<24} {entry['rows']:>8} rows {entry['bytes'] / 1e6:>8.2f} MB")
    if args.json:
        write_json(args.json, meta)


if __name__ == "__main__":
    forgive_text()
    main()

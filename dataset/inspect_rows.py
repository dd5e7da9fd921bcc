"""Show the sequences of a dataset as text, the trained tokens in colour: the first look at any new
data.

    python dataset/lm_dataset.py --inspect my_data.jsonl --rows 3 --max_seq_len 512
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from dataset.files.jsonl import find_shards, iter_lines, parse_row
from dataset.lm_dataset import PretrainDataset, SFTDataset
from dataset.packing import IGNORE, pack
from dataset.pair_dataset import PairDataset
from dataset.prompt_dataset import PromptDataset
from dataset.token_dataset import BAD_ROWS, TokenDataset
from model.files import forgive_text, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STAGES = {
    "pretrain": PretrainDataset,
    "sft": SFTDataset,
    "pairs": PairDataset,
    "prompts": PromptDataset,
}


def show_rows(
    dataset: TokenDataset, tokenizer: PreTrainedTokenizerBase, count: int, out: TextIO | None = None
) -> None:
    """Print the first `count` sequences of a dataset as text, then its report and the padding of
    its packing.

    Targets are green on a terminal; elsewhere, or with NO_COLOR set, they stand in ⟦ ⟧.
    """
    out = out or sys.stdout
    colour = out.isatty() and not os.environ.get("NO_COLOR")
    begin, end = ("\033[32m", "\033[0m") if colour else ("⟦", "⟧")
    for index in range(min(count, len(dataset))):
        sequence = dataset[index]
        trained = sequence["labels"] != IGNORE
        print(f"--- sequence {index}: {len(trained)} tokens, {trained.sum()} trained on", file=out)
        pairs = zip(sequence["input_ids"].tolist(), trained.tolist(), strict=True)
        for is_target, run in groupby(pairs, key=lambda pair: pair[1]):
            text = tokenizer.decode([token for token, _ in run], skip_special_tokens=False)
            print(f"{begin}{text}{end}" if is_target else text, end="", file=out)
        print(file=out)
    print("---", file=out)
    print(dataset.report, file=out)
    padding = padding_ratio(dataset)
    print(f"packed in batch rows of {dataset.max_seq_len}: {padding:.2%} padding", file=out)


def padding_ratio(dataset: TokenDataset) -> float:
    """Return the ratio of padding when the dataset is packed in batch rows of its max_seq_len."""
    num_rows = len(pack(dataset.lengths, dataset.max_seq_len, seed=0, epoch=0))
    return 1 - int(dataset.lengths.sum()) / (num_rows * dataset.max_seq_len)


def show_prompts(
    dataset: PromptDataset,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    out: TextIO | None = None,
) -> None:
    """Print the first `count` prompts as text with the keys that check their completions."""
    for row, ids in zip(dataset.rows[:count], dataset.prompts):
        print(f"--- prompt: {len(ids)} tokens", file=out)
        print(tokenizer.decode(ids, skip_special_tokens=False), file=out)
        others = {key: value for key, value in row.items() if key != "conversations"}
        print(json.dumps(others, ensure_ascii=False), file=out)
    print("---", file=out)
    print(dataset.report, file=out)


def stage_of(path: str, bad_rows: str) -> str:
    """The stage that reads rows like the first one; ValueError if none does."""
    file, _ = find_shards(path)[0]
    for line_no, line in iter_lines(file):
        try:
            row = parse_row(line)
        except ValueError as error:
            if bad_rows == "skip":
                continue
            raise ValueError(f"{file}:{line_no}: {error}") from error
        keys = row.keys()
        if "text" in keys:
            return "pretrain"
        if "chosen" in keys:
            return "pairs"
        if "question" in keys or ("conversations" in keys and {"answer", "gt"} & keys):
            return "prompts"
        if "conversations" in keys:
            return "sft"
        raise ValueError(
            f"{file}:{line_no}: no stage reads a row with the keys {', '.join(keys)}. Convert it: "
            f"python dataset/prepare_data.py convert {file} --out rows.jsonl"
        )
    raise ValueError(f"{file}: no row can be read.")


def main(argv: list[str] | None = None) -> None:
    """Run the command line of `dataset/lm_dataset.py`."""
    parser = argparse.ArgumentParser(
        prog="lm_dataset.py",
        allow_abbrev=False,
        description="Show the sequences that a data file becomes in training.",
    )
    parser.add_argument(
        "--inspect", required=True, metavar="FILE", help=".jsonl, .jsonl.gz or .jsonl.xz"
    )
    parser.add_argument("--stage", choices=STAGES, help="default: by the first row")
    parser.add_argument("--rows", type=int, default=3, help="sequences to print")
    parser.add_argument("--max_seq_len", type=int, default=512)
    parser.add_argument("--bad_rows", choices=BAD_ROWS, default="stop")
    parser.add_argument("--tokenizer", default=str(ROOT / "model"), help="folder")
    parser.add_argument("--cache_dir", help="default: dataset/cache")
    parser.add_argument("--json", metavar="FILE", help="write the metrics there too")
    args = parser.parse_args(argv)
    # seconds: not before the arguments are known to be good
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    try:
        stage = args.stage or stage_of(args.inspect, args.bad_rows)
        cache = {} if stage == "prompts" else {"cache_dir": args.cache_dir}
        dataset = STAGES[stage](
            args.inspect, tokenizer, args.max_seq_len, bad_rows=args.bad_rows, **cache
        )
    except ValueError as error:
        sys.exit(f"error: {error}")
    if stage == "prompts":
        show_prompts(dataset, tokenizer, args.rows)
    else:
        show_rows(dataset, tokenizer, args.rows)
    if args.json and stage == "prompts":
        write_json(args.json, {"prompts": len(dataset), "fingerprint": dataset.fingerprint})
    elif args.json:
        metrics = asdict(dataset.report)
        metrics |= {"padding_ratio": padding_ratio(dataset), "fingerprint": dataset.fingerprint}
        write_json(args.json, metrics)


if __name__ == "__main__":
    forgive_text()
    main()

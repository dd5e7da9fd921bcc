"""The data of a run: files or the toy world, the held-out part, the cut into steps."""

from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from dataset.inspect_rows import show_rows
from dataset.packing import IGNORE, PackedBatches
from trainer.runtime.arguments import ROOT
from trainer.runtime.process import Compute
from trainer.runtime.run import Inspected, Run
from trainer.runtime.usual_files import usual_file

TOY = ROOT / "dataset" / "toy_mini"


def open_datasets(
    run: Run,
    tokenizer: PreTrainedTokenizerBase,
    kind: type,
    toy_files: list[str],
    toy_val: str | None = None,
    **options: Any,
) -> tuple[Any, dict[str, Any]]:
    """(training set, {name: validation set}) of the files of --data_path.

    Without --data_path: see `use_default_data`; the toy world's `toy_files` are validated on
    `toy_val`, if there is one.
    kind(paths, tokenizer, max_seq_len, **options) makes a dataset. With --inspect the sequences are
    shown and the run ends.
    """
    args = run.args
    use_default_data(run, toy_files, toy_val)
    options |= {"cache_dir": args.cache_dir, "num_proc": args.num_proc, "bad_rows": args.bad_rows}

    def build(paths: list[str]) -> Any:
        return kind(paths, tokenizer, args.max_seq_len, **options)

    dataset = build(args.data_path)
    if args.inspect:
        show_rows(dataset, tokenizer, args.inspect)
        raise Inspected
    run.print0(dataset.report)
    return split_validation(run, dataset, build)


def use_default_data(run: Run, toy_files: list[str], toy_val: str | None = None) -> None:
    """Without --data_path, take a file of a usual name in dataset/, else the toy world.

    --data_path toy is the toy world in any case.
    """
    args = run.args
    if args.data_path and args.data_path != ["toy"]:
        return
    found = usual_file(toy_files[0].split("_")[0])
    if found and not args.data_path:
        args.data_path = [str(found)]
        run.print0(f"no --data_path: learning from {found}")
        return
    from dataset.toy_world import write_world

    if not args.data_path:
        run.print0("no --data_path: learning from the toy world, invented, with small questions")
    run.ranks.from_main(lambda: write_world("mini", TOY))
    args.data_path = [str(TOY / name) for name in toy_files]
    if toy_val and not args.val_path and not {"val_ratio", "val_max_rows"} & args.given:
        args.val_path = [str(TOY / toy_val)]


def split_validation(
    run: Run, dataset: Any, build: Callable[[list[str]], Any]
) -> tuple[Any, dict[str, Any]]:
    """(training set, {name: validation set}): files of --val_path, or --val_ratio of the data."""
    args = run.args
    if args.val_path:
        names = [Path(path).name.split(".jsonl")[0] for path in args.val_path]
        if len(set(names)) < len(names):
            raise ValueError(
                f"--val_path: two files are called {max(names, key=names.count)!r}, and their "
                "metrics would be mixed up; rename one"
            )
        return dataset, {name: build([path]) for name, path in zip(names, args.val_path)}
    if not args.val_ratio:
        return dataset, {}
    train_set, held_out = dataset.held_out_split(
        args.val_ratio, seed=args.seed, max_rows=args.val_max_rows
    )
    return train_set, {"held_out": held_out}


def training_batches(run: Run, dataset: Any, pad_id: int, kind: type = PackedBatches) -> Any:
    """The optimizer steps of a run; a resumed run keeps the batch rows of a step.

    kind: PackedBatches or PairBatches.
    """
    args = run.args
    return kind(
        dataset,
        batch_size=args.batch_size,
        accumulation_steps=args.accumulation_steps,
        max_seq_len=args.max_seq_len,
        seed=args.seed,
        epochs=args.epochs,
        max_steps=args.max_steps,
        pad_id=pad_id,
        rank=run.ranks.rank,
        world_size=run.ranks.world_size,
        rows_per_step=run.rows_per_step,
    )


def single_pass(
    run: Compute, dataset: Any, pad_id: int, kind: type = PackedBatches, **options: Any
) -> Iterator[dict[str, torch.Tensor]]:
    """The micro-batches of this rank in one pass over a dataset.

    options: batch_size, max_seq_len, seed (default: 0).
    """
    steps = kind(
        dataset,
        accumulation_steps=1,
        epochs=1,
        pad_id=pad_id,
        rank=run.ranks.rank,
        world_size=run.ranks.world_size,
        **{"seed": 0, **options},
    )
    return chain.from_iterable(steps)


def documents_of(micro: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """The documents of a packed micro-batch as {"input_ids", "labels"}, int64 [n]."""
    found = []
    for ids, labels, positions in zip(micro["input_ids"], micro["labels"], micro["position_ids"]):
        starts = (positions == 0).nonzero()[:, 0]
        lengths = torch.diff(starts, append=torch.tensor([len(ids)])).tolist()
        found += [
            {"input_ids": x, "labels": y}
            for x, y in zip(ids.split(lengths), labels.split(lengths))
            if (y != IGNORE).any()  # the rest is padding
        ]
    return found

"""convert_model.py merge: adapters into the network that they were trained on. The result is one
checkpoint folder that needs no adapter any more.

    python scripts/convert_model.py merge --from_weight full_sft --adapter out/lora_tiny
    python scripts/convert_model.py merge --from_weight full_sft \\
        --adapter out/lora_tiny out/lora_medical_tiny --out out/both

A weight W becomes W + (alpha / r) B A, or DoRA's version of it; the changes of several adapters are
added up. The folder (default: SAVE_DIR/merged_<preset or size>) is like that of any stage, so that
every tool reads it. Its merged_adapters.json names its base and adapters by SHA-256: an adapter
that is in a network already is not added a second time.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from model.files import file_sha256, write_json
from scripts.checkpoint import ShapeArgs, load_checkpoint
from scripts.conversion.outputs import (
    check_place,
    largest_difference,
    replace_folder,
    weight_hashes,
)
from trainer.runtime.arguments import arg

RECORD = "merged_adapters.json"


@dataclass
class MergeArgs(ShapeArgs):
    from_weight: str = arg(
        "full_sft",
        "the network: the name of a run in SAVE_DIR, a checkpoint folder, or a .pth file",
    )
    adapter: list[str] = arg([], "folders of adapters (PEFT format)", nargs="+")
    out: str = arg("", "folder to write (default: SAVE_DIR/merged_<preset or size>)")
    overwrite: bool = arg(
        False, "replace that folder, should it be there as an earlier result of this script"
    )

    def check(self) -> None:
        if not self.adapter:
            raise ValueError("--adapter is missing: give the folders of one or more adapters")


def read_record(folder: Path) -> dict:
    """{"base", "base_sha256", "adapters": [{"folder", "sha256"}]}; unmerged: {"adapters": []}."""
    path = Path(folder) / RECORD
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"adapters": []}


def identity(record: dict) -> tuple:
    """The SHA-256 of the base's files and of the adapters: together they decide the weights."""
    return record.get("base_sha256"), sorted(one["sha256"] for one in record["adapters"])


def new_adapters(folders: Sequence[str], source: Path) -> list[dict]:
    """[{"folder", "sha256"}] of the adapters that are not in the network yet, each once."""
    from model.adapter_format import WEIGHTS, read_adapter_config

    present, added = {one["sha256"] for one in read_record(source)["adapters"]}, {}
    for folder in folders:
        file = Path(folder)
        if file.suffix != ".pth":
            read_adapter_config(folder)  # ValueError for a folder that is no adapter
            file = file / WEIGHTS
        digest = file_sha256(file)
        if digest in present:
            print(f"{folder} is in {source} already: it is not added again")
        elif digest in added:
            print(f"{folder} is given twice: it is added once")
        else:
            added[digest] = {"folder": folder, "sha256": digest}
    return list(added.values())


def merge(args: MergeArgs) -> None:
    """Write the folder, unless it is there already; ValueError if that cannot be."""
    import torch

    from trainer.runtime.run_folder import shape_name
    from trainer.runtime.weights import find_adapter, find_weight

    cpu = torch.device("cpu")
    source = find_weight(args.from_weight, args, cpu).resolve()
    adapters = [str(find_adapter(one, args)) for one in args.adapter]
    added = new_adapters(adapters, source)
    if not added:
        return
    folders = [one["folder"] for one in added]
    model, tokenizer = load_checkpoint(str(source), args, cpu, folders, merge=False)
    record = {
        "base": str(source),
        "base_sha256": weight_hashes(source),
        "adapters": [*read_record(source)["adapters"], *added],
    }
    out = Path(args.out or Path(args.save_dir) / f"merged_{shape_name(model.config)}")
    if identity(read_record(out)) == identity(record):
        return print(f"{out} is that already: nothing to do")
    check_place(out, args.overwrite, [source, *adapters], RECORD)
    merged, _ = load_checkpoint(str(source), args, cpu, folders)

    def fill(folder: Path) -> None:
        merged.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_json(folder / RECORD, record)

    replace_folder(out, fill)
    names = ", ".join(Path(folder).name for folder in folders)
    print(f"{out}: {source.name} with {names}. Talk to it: python eval_llm.py --weight {out}")
    print(f"logits before and after: at most {largest_difference(model, out):.1e} apart")

"""Merge adapters into the network that they were trained on: one checkpoint folder, which needs no
adapter any more.

    python scripts/merge_lora.py --from_weight full_sft --adapter out/lora_tiny   # out/merged_tiny
    python scripts/merge_lora.py --from_weight full_sft \\
        --adapter out/lora_tiny out/lora_medical_tiny --out out/both

A weight W becomes W + (alpha / r) B A, or DoRA's version of it; the changes of several adapters are
added up. The folder is like that of any stage, so that every tool reads it. Its
merged_adapters.json names its base and adapters by SHA-256: an adapter that is in a network already
is not added a second time.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dataset.files.outputs import why_unwritable
from model.files import file_sha256, write_json
from scripts.checkpoint import ShapeArgs, load_checkpoint
from trainer.runtime.arguments import arg, command, parse_args

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from model.model_minimind import MiniMindForCausalLM

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


def hashes(record: dict) -> tuple:
    """The SHA-256 of the base's files and of the adapters: together they decide the weights."""
    return record.get("base_sha256"), sorted(one["sha256"] for one in record["adapters"])


def new_adapters(folders: Sequence[str], source: Path) -> list[dict]:
    """[{"folder", "sha256"}] of the adapters that are not in the network yet, each once."""
    from model.adapter_format import WEIGHTS, read_adapter_config

    present, added = {one["sha256"] for one in read_record(source)["adapters"]}, {}
    for folder in folders:
        read_adapter_config(folder)  # ValueError for a folder that is no adapter
        digest = file_sha256(Path(folder) / WEIGHTS)
        if digest in present:
            print(f"{folder} is in {source} already: it is not added again")
        elif digest in added:
            print(f"{folder} is given twice: it is added once")
        else:
            added[digest] = {"folder": folder, "sha256": digest}
    return list(added.values())


def check_place(out: Path, overwrite: bool, sources: Sequence[str | Path]) -> None:
    """ValueError if `out` cannot be written or must not be replaced; sources: base and adapters."""
    if problem := why_unwritable(out):
        raise ValueError(
            f"{problem}: choose another --out than {out}, or give back the right to write there"
        )
    if (out / "checkpoints").is_dir():
        raise ValueError(f"{out} is the folder of a training run: choose another --out")
    for source in sources:
        if Path(source).resolve().is_relative_to(out.resolve()):
            raise ValueError(f"{out} holds {source}, which is merged here: choose another --out")
    if out.exists() and not (out / RECORD).is_file():
        raise ValueError(
            f"{out} is there already and holds no {RECORD}, so it does not come from here: choose "
            "another --out"
        )
    if out.exists() and not overwrite:
        raise ValueError(
            f"{out} is there already: choose another --out, or replace it (--overwrite)"
        )


def main(argv: list[str] | None = None) -> None:
    args = parse_args(MergeArgs, argv)
    import torch

    from trainer.runtime.run_folder import shape_name
    from trainer.runtime.weights import find_weight

    cpu = torch.device("cpu")
    source = find_weight(args.from_weight, args, cpu).resolve()
    added = new_adapters(args.adapter, source)
    if not added:
        return
    folders = [one["folder"] for one in added]
    model, tokenizer = load_checkpoint(str(source), args, cpu, folders)
    files = [source] if source.suffix == ".pth" else sorted(source.glob("*.safetensors"))
    record = {
        "base": str(source),
        "base_sha256": {path.name: file_sha256(path) for path in files},
        "adapters": [*read_record(source)["adapters"], *added],
    }
    out = Path(args.out or Path(args.save_dir) / f"merged_{shape_name(model.config)}")
    if hashes(read_record(out)) == hashes(record):
        return print(f"{out} is that already: nothing to do")
    check_place(out, args.overwrite, [source, *args.adapter])
    write(model, tokenizer, record, out)
    names = ", ".join(Path(folder).name for folder in folders)
    print(f"{out}: {source.name} with {names}. Talk to it: python eval_llm.py --weight {out}")


def write(
    model: MiniMindForCausalLM, tokenizer: PreTrainedTokenizerBase, record: dict, out: Path
) -> None:
    """Write the folder under another name, rename it when whole, and then delete a former one."""
    out = out.resolve()
    draft, old = out.with_name(f".{out.name}.new"), out.with_name(f".{out.name}.old")
    shutil.rmtree(draft, ignore_errors=True)  # of a process that was killed
    model.save_pretrained(draft)
    tokenizer.save_pretrained(draft)
    write_json(draft / RECORD, record)
    if out.exists():
        shutil.rmtree(old, ignore_errors=True)
        out.rename(old)
    draft.rename(out)
    shutil.rmtree(old, ignore_errors=True)


if __name__ == "__main__":
    command(main)

"""Merge adapters into the network that they were trained on: one checkpoint folder, which needs no adapter any more.

    python scripts/merge_lora.py --from_weight full_sft --adapter out/lora_tiny                           # into out/merged_tiny
    python scripts/merge_lora.py --from_weight full_sft --adapter out/lora_tiny out/lora_medical_tiny --out out/both

A weight W becomes W + (alpha / r) B A, or what DoRA makes of it; of several adapters the changes are added up. The folder is
like that of any stage, so that every tool reads it. Its merged_adapters.json says by SHA-256 what went into it: an adapter that
is in a network is not added a second time.
"""

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch

from dataset.outputs import why_unwritable
from model.adapter_format import WEIGHTS, read_adapter_config
from model.model_lora import merge_adapter
from model.model_minimind import PRESETS
from trainer.arguments import arg, command, parse_args
from trainer.checkpoint import sha256
from trainer.metrics import write_json
from trainer.weights import find_weight, read_weight, shape_name, take_template

RECORD = "merged_adapters.json"


@dataclass
class MergeArgs:
    from_weight: str = arg("full_sft", "the network: the name of a run in SAVE_DIR, a checkpoint folder, or a .pth file")
    adapter: list[str] = arg([], "folders of adapters (PEFT format)", nargs="+")
    save_dir: str = arg(str(ROOT / "out"), "folder that holds the folders of all runs")
    out: str = arg("", "folder to write (default: SAVE_DIR/merged_<preset or size>)")
    overwrite: bool = arg(False, "replace that folder, should it be there as an earlier result of this script")
    preset: str = arg("", "which of the runs of that name; for a .pth file, its shape", choices=list(PRESETS))
    hidden_size: int | None = arg(None, "for a .pth file: width, in place of the preset's")
    num_hidden_layers: int | None = arg(None, "for a .pth file: layers, in place of the preset's")
    use_moe: bool = arg(False, "for a .pth file: it is a mixture of experts")

    def check(self):
        """ValueError without an adapter."""
        if not self.adapter:
            raise ValueError("--adapter is missing: give the folders of one or more adapters")


def read_record(folder):
    """What was merged into a network: {"base", "base_sha256", "adapters": [{"folder", "sha256"}]}, with none where none was."""
    path = Path(folder) / RECORD
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"adapters": []}


def hashes(record):
    """What decides the weights: the SHA-256 of the base's files and of the adapters."""
    return record.get("base_sha256"), sorted(one["sha256"] for one in record["adapters"])


def check_place(out, overwrite, sources):
    """ValueError if the folder cannot be written, or holds something that must not be replaced; sources: what is merged."""
    if problem := why_unwritable(out):
        raise ValueError(f"{problem}: choose another --out than {out}, or give back the right to write there")
    if (out / "checkpoints").is_dir():
        raise ValueError(f"{out} is the folder of a training run: choose another --out")
    for source in sources:
        if Path(source).resolve().is_relative_to(out.resolve()):
            raise ValueError(f"{out} holds {source}, which is merged here: choose another --out")
    if out.exists() and not (out / RECORD).is_file():
        raise ValueError(f"{out} is there already and holds no {RECORD}, so it does not come from here: choose another --out")
    if out.exists() and not overwrite:
        raise ValueError(f"{out} is there already: choose another --out, or replace it (--overwrite)")


def main(argv=None):
    args = parse_args(MergeArgs, argv)
    cpu = torch.device("cpu")
    source = find_weight(args.from_weight, args, cpu).resolve()
    adapters, added = read_record(source)["adapters"], []
    for folder in args.adapter:
        read_adapter_config(folder)  # names what is wrong with it
        digest = sha256(Path(folder) / WEIGHTS)
        if any(one["sha256"] == digest for one in adapters):
            print(f"{folder} is in {source} already: it is not added again")
        elif any(one["sha256"] == digest for one in added):
            print(f"{folder} is given twice: it is added once")
        else:
            added.append({"folder": folder, "sha256": digest})
    if not added:
        return
    model, tokenizer = read_weight(str(source), args, cpu)
    files = [source] if source.suffix == ".pth" else sorted(source.glob("*.safetensors"))
    record = {"base": str(source), "base_sha256": {path.name: sha256(path) for path in files}, "adapters": [*adapters, *added]}
    out = Path(args.out or Path(args.save_dir) / f"merged_{shape_name(model.config)}")
    if hashes(read_record(out)) == hashes(record):
        return print(f"{out} is that already: nothing to do")
    check_place(out, args.overwrite, [source, *args.adapter])
    merge_adapter(model, *(one["folder"] for one in added))
    take_template(tokenizer, args.adapter)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    write(model, tokenizer, record, out)
    print(f"{out}: {source.name} with {', '.join(Path(one['folder']).name for one in added)}. "
          f"Talk to it: python eval_llm.py --weight {out}")


def write(model, tokenizer, record, out):
    """Write the checkpoint folder beside its place, and move it there when it is whole; only then what was there is deleted."""
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

"""The checkpoint that a script works with: the flags that name it, and how it is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from model.presets import PRESETS
from trainer.runtime.arguments import ROOT, arg

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from model.model_minimind import MiniMindForCausalLM


@dataclass
class DeviceArgs:
    """Where a network runs."""

    device: str = arg("auto", "cpu, cuda, cuda:1, ...; auto: the GPU if there is one")


@dataclass
class ComputeArgs(DeviceArgs):
    """Where a network runs, and in which arithmetic."""

    dtype: str = arg(
        "auto",
        "arithmetic; auto: bfloat16 on a GPU that has it, else float32",
        choices=["auto", "float32", "bfloat16", "float16"],
    )


@dataclass
class ShapeArgs:
    """Where runs are found, and the shape of a .pth file, which does not hold its own."""

    save_dir: str = arg(str(ROOT / "out"), "folder that holds the folders of all runs")
    preset: str = arg(
        "", "which of the runs of that name; for a .pth file, its shape", choices=list(PRESETS)
    )
    hidden_size: int | None = arg(None, "for a .pth file: width, in place of the preset's")
    num_hidden_layers: int | None = arg(None, "for a .pth file: layers, in place of the preset's")
    use_moe: bool = arg(False, "for a .pth file: it is a mixture of experts")


@dataclass
class WeightArgs(ComputeArgs, ShapeArgs):
    """One checkpoint, with adapters if they are given."""

    weight: str = arg(
        "full_sft", "the model: the name of a run in SAVE_DIR, a checkpoint folder, or a .pth file"
    )
    adapter: list[str] = arg(
        [],
        "folder of a LoRA adapter (PEFT format) to merge into the weights; the changes of several "
        "are added up",
        nargs="+",
    )


def load_checkpoint(
    weight: str,
    args: ShapeArgs,
    device: torch.device,
    adapters: Sequence[str | Path] = (),
    merge: bool = True,
) -> tuple[MiniMindForCausalLM, PreTrainedTokenizerBase]:
    """(model in evaluation mode on `device`, tokenizer) of a run's name, a folder or a .pth file.

    Adapters are merged into the weights, or, with merge=False, stay apart and are all switched on.
    Generation ends at the tokenizer's end of a turn and of a document.
    """
    from model.model_lora import adapter_names, free_name, load_adapter, merge_adapter, set_adapter
    from trainer.runtime.weights import read_weight, take_template

    model, tokenizer = read_weight(weight, args, device)
    if merge:
        merge_adapter(model, *adapters)
    else:
        for folder in adapters:
            load_adapter(model, folder, free_name(model, Path(folder).resolve().name))
        set_adapter(model, adapter_names(model))
    take_template(tokenizer, adapters)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    return model.to(device).eval(), tokenizer

"""The checkpoint that a script works with: the flags that name it, and how it is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

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
    """Where runs are found, which of the runs of a name is meant, and how it is read."""

    given: ClassVar[frozenset[str]] = frozenset()  # `parse_args` sets the written ones
    save_dir: str = arg(
        str(ROOT / "out"), "folder that holds the folders of all runs", aliases=("out_dir",)
    )
    preset: str = arg("", "which of the runs of that name: its shape", choices=list(PRESETS))
    hidden_size: int | None = arg(
        None, "which of the runs of that name: its width", aliases=("dim",)
    )
    num_hidden_layers: int | None = arg(
        None, "which of the runs of that name: its layers", aliases=("n_layers",)
    )
    use_moe: bool = arg(False, "which of the runs of that name: the mixture of experts")
    tokenizer_path: str = arg(
        "",
        "folder of the tokenizer (default: that of the checkpoint; for a .pth file, the one beside "
        "it or the one that it predicts well with)",
    )
    inference_rope_scaling: bool = arg(
        False, "YaRN: stretch the positions to 16 times 2,048, for texts longer than it was trained"
    )


@dataclass
class WeightArgs(ComputeArgs, ShapeArgs):
    """One checkpoint, with adapters if they are given."""

    weight: str = arg(
        "full_sft", "the model: the name of a run in SAVE_DIR, a checkpoint folder, or a .pth file"
    )
    load_from: str = arg(
        "",
        "the same for a checkpoint folder, as the minimind tutorials have it; a folder with a "
        "tokenizer alone is the --tokenizer_path of --weight",
    )
    adapter: list[str] = arg(
        [],
        "LoRA adapters to merge into the weights: names of runs in SAVE_DIR, folders (PEFT format) "
        "or .pth files; the changes of several are added up",
        nargs="+",
        aliases=("lora_weight", "lora_name"),
    )

    def check(self) -> None:
        """Resolve --load_from. ValueError for a folder that is neither, or if it contradicts."""
        if self.adapter == ["None"]:  # how the tutorials say none
            self.adapter = []
        if not self.load_from:
            return
        folder = Path(self.load_from)
        if (folder / "config.json").is_file():
            if "weight" in self.given:
                raise ValueError(
                    f"--load_from {folder} and --weight {self.weight} both name the model: leave "
                    "one out"
                )
            self.weight = [str(folder)] if isinstance(self.weight, list) else str(folder)
        elif not (folder / "tokenizer.json").is_file():
            raise ValueError(
                f"--load_from {folder}: it has neither config.json nor tokenizer.json; give a "
                "checkpoint folder, or leave it out and give --weight"
            )
        elif folder.resolve() != ROOT / "model":  # ours is found without it
            self.tokenizer_path = self.tokenizer_path or str(folder)


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
    from model.legacy_format import ROPE_SCALING
    from model.model_lora import adapter_names, free_name, load_adapter, merge_adapter, set_adapter
    from trainer.runtime.weights import find_adapter, read_weight, take_template

    model, tokenizer = read_weight(weight, args, device)
    if args.inference_rope_scaling:
        model.config.rope_parameters = {**model.config.rope_parameters, **ROPE_SCALING}
    adapters = [find_adapter(str(one), args) for one in adapters]
    if merge:
        merge_adapter(model, *adapters)
    else:
        for folder in adapters:
            load_adapter(
                model, folder, free_name(model, folder.resolve().name.removesuffix(".pth"))
            )
        set_adapter(model, adapter_names(model))
    take_template(tokenizer, adapters)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    return model.to(device).eval(), tokenizer

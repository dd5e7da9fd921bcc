"""convert_model.py native: a checkpoint of this family, of any age, as a folder of the standard
architecture.

    python scripts/convert_model.py native full_sft_512.pth --out out/old_chat
    python scripts/convert_model.py native minimind-3 --out out/minimind-3       # with auto_map
    python scripts/convert_model.py native lora_identity_512.pth --from_weight full_sft_512.pth \\
        --out out/lora_identity

Reads `.pth` files, pytorch_model.bin and model.safetensors of folders with the family's own class,
whose code is not run, and LoRA adapters in `.pth` files, which become folders of the PEFT library.
Shapes are read from the tensors. All scripts read the same sources directly; this makes them
readable for other programs.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from model.files import write_json
from scripts.checkpoint import ShapeArgs
from scripts.conversion.outputs import (
    check_place,
    largest_difference,
    random_ids,
    replace_folder,
    weight_hashes,
)
from trainer.runtime.arguments import arg, check_positive

if TYPE_CHECKING:
    from model.model_minimind import MiniMindForCausalLM

RECORD = "converted.json"
MOST_APART = 1e-3  # logits of two implementations, in float32


@dataclass
class NativeArgs:
    source: str = arg("", "a .pth file or a checkpoint folder", positional=True)
    out: str = arg("", "folder to write")
    tokenizer_path: str = arg(
        "", "folder of the tokenizer that it was trained with (default: found, see eval_llm.py)"
    )
    from_weight: str = arg("", "for a LoRA adapter: the network that it was trained on")
    save_dir: str = arg(ShapeArgs.save_dir, "folder in which --from_weight may be a run")
    num_attention_heads: int | None = arg(
        None, "for a .pth file, which does not hold it (default: that of its age)"
    )
    rope_theta: float | None = arg(None, "the same for the base of the rotary positions")
    rms_norm_eps: float | None = arg(None, "the same for the epsilon of the norms")
    overwrite: bool = arg(False, "replace that folder, should it be an earlier result of this")

    def check(self) -> None:
        if not self.out:
            raise ValueError("--out is missing: give the folder to write")
        check_positive(self, "num_attention_heads", "rope_theta", "rms_norm_eps")
        if self.known() and not self.source.endswith(".pth"):
            raise ValueError(
                f"{' '.join(f'--{name}' for name in self.known())}: only for a .pth file; the "
                f"config.json of {self.source} says that"
            )

    def known(self) -> dict[str, float]:
        """What is said of the network's shape."""
        names = ("num_attention_heads", "rope_theta", "rms_norm_eps")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


def to_native(args: NativeArgs) -> None:
    """Write the folder, and say by how much its logits differ from the source's."""
    from model.legacy_format import is_lora, read_pickle

    source, out = Path(args.source), Path(args.out)
    check_place(out, args.overwrite, [source], RECORD)
    if source.suffix == ".pth" and is_lora(read_pickle(source)):
        return adapter_to_native(args, source, out)
    if args.from_weight:
        raise ValueError(f"{source} is a network, no adapter: leave --from_weight out")
    from model.model_minimind import MiniMindForCausalLM
    from trainer.runtime.run_folder import shape_name
    from trainer.runtime.tokenizer import tokenizer_of

    if source.suffix == ".pth":
        known = args.known()
        if theta := known.pop("rope_theta", None):
            known["rope_parameters"] = {"rope_theta": theta}
        model = MiniMindForCausalLM.from_pth(source, **known)
    else:
        model = MiniMindForCausalLM.from_pretrained(source)
    tokenizer = tokenizer_of(model, source, args.tokenizer_path)
    model.generation_config.eos_token_id = sorted(
        {tokenizer.eos_token_id, tokenizer.pad_token_id} - {None}
    )

    def fill(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_json(folder / RECORD, {"source": str(source), "sha256": weight_hashes(source)})

    replace_folder(out, fill)
    print(
        f"{out}: {source.name} as {type_of(out)}, {shape_name(model.config)}; logits before and "
        f"after: at most {largest_difference(model, out):.1e} apart{other_program(model, out)}"
    )


def type_of(folder: Path) -> str:
    """The architecture that a folder's config.json names."""
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"][0]


def other_program(model: MiniMindForCausalLM, folder: Path) -> str:
    """The same comparison by transformers, as words; "" for a type that it does not know.

    Raises ValueError if it computes something else.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    if type_of(folder) == "MiniMindForCausalLM":
        return ", and transformers needs trust_remote_code for this shape"
    ids = random_ids(model.config.vocab_size)
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
        apart = float((model(ids).logits - theirs).abs().max())
    if apart > MOST_APART:
        raise ValueError(
            f"{folder} is not what transformers computes: its logits are {apart:.1e} apart; please "
            "report it, with the source's shape"
        )
    return f", {apart:.1e} in transformers"


def adapter_to_native(args: NativeArgs, source: Path, out: Path) -> None:
    """Write the PEFT folder of an adapter in a `.pth` file."""
    if not args.from_weight:
        raise ValueError(
            f"{source} is a LoRA adapter: give the network that it was trained on as --from_weight"
        )
    if args.known():
        raise ValueError(
            f"{source} is a LoRA adapter: leave {' '.join(f'--{x}' for x in args.known())} out"
        )
    import torch

    from model.adapter_format import Base, LoRASettings, last_part, write_adapter
    from model.model_lora import adaptable_layers, read_fitting
    from model.native_format import network_sha256
    from scripts.checkpoint import load_checkpoint
    from trainer.runtime.weights import find_weight

    cpu = torch.device("cpu")
    shape = ShapeArgs(save_dir=args.save_dir, tokenizer_path=args.tokenizer_path)
    base = find_weight(args.from_weight, shape, cpu)
    check_place(out, args.overwrite, [source, base], RECORD)
    model, _ = load_checkpoint(str(base), shape, cpu)
    layers = read_fitting(model, source)
    rank = len(next(iter(layers.values())).A)
    settings = LoRASettings(rank, rank, target_modules=sorted({*map(last_part, layers)}))
    home = Base(base, model.config, list(adaptable_layers(model)), network_sha256(model))

    def fill(folder: Path) -> None:
        write_adapter(folder, layers, settings, home)
        write_json(folder / RECORD, {"source": str(source), "sha256": weight_hashes(source)})

    replace_folder(out, fill)
    before, _ = load_checkpoint(str(base), shape, cpu, [source])
    after, _ = load_checkpoint(str(base), shape, cpu, [out])
    print(
        f"{out}: {source.name}, rank {rank}, {len(layers)} layers of {base.name}; logits before "
        f"and after: at most {largest_difference(before, after):.1e} apart"
    )

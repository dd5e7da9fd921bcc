"""convert_model.py pth: a checkpoint as a `.pth` file of jingyaogong/minimind's classes.

    python scripts/convert_model.py pth full_sft --out full_sft_768.pth

Networks with q/k norm get the names of its class of 2026, others those of 2025. A `.pth` file holds
tensors alone: the shape that its class must be given is printed, and stands in FILE.json for our
own reader; the tokenizer goes into the folder FILE_tokenizer.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dataset.files.outputs import why_unwritable
from model.files import replace_file, write_json
from scripts.checkpoint import ShapeArgs, load_checkpoint
from scripts.conversion.outputs import largest_difference
from trainer.runtime.arguments import arg

if TYPE_CHECKING:
    from model.model_minimind import MiniMindConfig

SHAPE = (  # as its MiniMindConfig calls it
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("intermediate_size", "rms_norm_eps"),
)
EXPERTS = ("num_experts_per_tok", "norm_topk_prob")


@dataclass
class PthArgs(ShapeArgs):
    source: str = arg("", "a run in SAVE_DIR, a checkpoint folder, or a .pth file", positional=True)
    out: str = arg("", "file to write: .pth")
    overwrite: bool = arg(False, "replace that file")

    def check(self) -> None:
        if not self.out.endswith(".pth"):
            raise ValueError(f"--out {self.out!r}: give a name that ends in .pth")
        out = Path(self.out)
        if problem := why_unwritable(out.parent):
            raise ValueError(f"{problem}: choose another --out than {out}")
        for path in (out, out.with_suffix(".json"), tokenizer_folder(out)):
            if path.exists() and not self.overwrite:
                raise ValueError(
                    f"{path} is there already: choose another --out, or replace it (--overwrite)"
                )


def tokenizer_folder(out: Path) -> Path:
    """Where the tokenizer of a `.pth` file goes."""
    return out.with_name(f"{out.stem}_tokenizer")


def to_pth(args: PthArgs) -> None:
    """Write the file and the tokenizer, and say by how much its logits differ from the source's."""
    import torch

    from model.legacy_format import NOT_IN_FILE, ROPE_SCALING, beside
    from model.model_minimind import MiniMindForCausalLM
    from model.native_format import split_experts

    model, tokenizer = load_checkpoint(args.source, args, torch.device("cpu"))
    if model.config.qk_norm and model.config.shared_expert_intermediate_size:
        raise ValueError(
            f"{args.source} has q/k norm and a shared expert: no class of that family computes both"
        )
    rope = model.config.rope_parameters
    if rope["rope_type"] == "yarn" and {**rope, **ROPE_SCALING} != rope:
        raise ValueError(
            f"{args.source} stretches its positions in another way ({rope}) than that family can: "
            f"{ROPE_SCALING}"
        )
    state = {
        name.replace(".shared_expert.", ".shared_experts.0."): x.contiguous()
        for name, x in split_experts(model.state_dict()).items()
    }
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    replace_file(out, lambda temporary: torch.save(state, temporary))
    tokenizer.save_pretrained(tokenizer_folder(out))
    write_json(beside(out), {name: getattr(model.config, name) for name in NOT_IN_FILE})
    again = MiniMindForCausalLM.from_pth(out)
    print(f"its class must be given: MiniMindConfig({shape_in_words(model.config)})")
    print(
        f"{out}, with its tokenizer in {out.stem}_tokenizer: logits before and after: at most "
        f"{largest_difference(model, again):.1e} apart"
    )


def shape_in_words(config: MiniMindConfig) -> str:
    """The keyword arguments of its MiniMindConfig for a network."""
    fields = {name: getattr(config, name) for name in SHAPE}
    fields["rope_theta"] = config.rope_parameters["rope_theta"]
    if config.rope_parameters["rope_type"] == "yarn":
        fields["inference_rope_scaling"] = True
    if not config.tie_word_embeddings:
        fields["tie_word_embeddings"] = False
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        fields["head_dim"] = config.head_dim
    if config.vocab_size != 6400:
        fields["vocab_size"] = config.vocab_size
    if config.num_experts:
        count = "num_experts" if config.qk_norm else "n_routed_experts"
        fields |= {"use_moe": True, count: config.num_experts}
        fields |= {name: getattr(config, name) for name in EXPERTS}
        if not config.qk_norm:
            fields["n_shared_experts"] = int(bool(config.shared_expert_intermediate_size))
    return ", ".join(f"{name}={value!r}" for name, value in fields.items())
